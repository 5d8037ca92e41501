"""Carriers compute what their source computes: logits, tokens and caches of the stock classes.

Truth is the stock class of the source with its own weights changed in place. All logits are in
float64, positions included (``stock.load``), so 1e-10 leaves room for sums in another order only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from convert.targets import Target, targets_for
from kvpatch.errors import InputModelError
from tests.families.stock import Float64, change_kv_heads, full_logits, load, make, random_ids
from tests.families.tiny import SIZES, family
from tests.helpers import assert_close, assert_equal
from tests.targets.applying import apply, facts_of, merged, write

_BASE = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
_RW = {"alibi": True, "multi_query": False, "parallel_attn": False}


def _neox(**settings: Any) -> dict[str, Any]:
    partial = settings.pop("partial", 0.25)
    rope = {"rope_type": "default", "rope_theta": 3e3, "partial_rotary_factor": partial}
    return {"hidden_size": 64, "rope_parameters": rope, **settings}


# source -> (model_type of the result, settings); the family is the part before the colon
_CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt_neox": ("phi", _neox()),
    "gpt_neox:nobias-tied": ("phi", _neox(attention_bias=False, tie_word_embeddings=True)),
    "gpt_neox:silu-whole": ("phi", _neox(hidden_act="silu", partial=1.0, layer_norm_eps=1e-3)),
    "gpt_neox:uneven": ("phi", _neox(hidden_size=80, partial=0.3)),
    "gpt_neox:sequential": ("starcoder2", _neox(use_parallel_residual=False)),
    "gpt_neox:sequential-half": ("starcoder2", _neox(use_parallel_residual=False, partial=0.5)),
    "gpt_neox:sequential-whole-nobias-tied": (
        "starcoder2",
        _neox(
            use_parallel_residual=False,
            partial=1.0,
            attention_bias=False,
            tie_word_embeddings=True,
            layer_norm_eps=1e-3,
        ),
    ),
    "gptj": ("phi", {"rotary_dim": 4}),
    "gptj:whole-tied": ("phi", {"rotary_dim": 12, "tie_word_embeddings": True, "n_inner": 40}),
    "codegen": ("phi", {"rotary_dim": 8}),
    "codegen:eight": ("phi", {"rotary_dim": 4, "num_attention_heads": 8, "n_inner": 40}),
    "gpt2": ("gpt_bigcode", {"n_inner": 40}),
    "gpt2:unscaled-untied": (
        "gpt_bigcode",
        {
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
            "activation_function": "relu",
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "opt": ("gpt_bigcode", {"ffn_dim": 40}),
    "opt:bare-untied": (
        "gpt_bigcode",
        {
            "ffn_dim": 40,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "falcon": ("falcon", {**_RW}),
    "falcon:bias-untied": ("falcon", {**_RW, "bias": True, "tie_word_embeddings": False}),
}
_CONVERSIONS = [
    (name, kv_heads)
    for name, (result, _) in _CASES.items()
    for kv_heads in ((1,) if result in ("gpt_bigcode", "falcon") else (4, 2, 1))
]
# what checkpoints of older transformers have besides, by family
_BUFFERS = {
    "gpt2": ("attn.bias", "attn.masked_bias"),
    "gptj": ("attn.bias", "attn.masked_bias"),
    "codegen": ("attn.causal_mask",),
    "gpt_neox": ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
}


@pytest.fixture
def source(tmp_path: Path, name: str) -> Path:
    """A random stock model, saved in float32."""
    folder = tmp_path / "source"
    make(family(name), {**_BASE, **_CASES[name][1]}, seed=4).save_pretrained(folder)
    return folder


def _target(source: Path, name: str, kv_heads: int) -> Target:
    """The carrier, among all that is possible."""
    facts, _ = facts_of(source)
    (target,) = (
        target
        for target in targets_for(facts, kv_heads=kv_heads)
        if (target.name, target.model_type) == ("native", _CASES[name][0])
    )
    return target


def _models(source: Path, name: str, kv_heads: int) -> tuple[Any, Any]:
    """The stock source with merged heads, and its conversion: two stock classes, in float64."""
    target = _target(source, name, kv_heads)
    actual = load(write(source, source.parent / "out", target, kv_heads=kv_heads))
    expected = load(source)
    before = full_logits(expected, random_ids(expected))
    change_kv_heads(expected, kv_heads, lambda heads: heads.mean(0), dtype=torch.float64)
    lost = (full_logits(expected, random_ids(expected)) - before).abs().max()
    assert (float(lost) > 1e-3) == (kv_heads < expected.config.num_attention_heads)
    assert type(actual).__name__ == target.architecture
    return expected, actual


@torch.no_grad()
def _generate(model: Any, ids: Tensor) -> Tensor:
    """Twelve more tokens, the likeliest ones, with a cache."""
    mask = torch.ones_like(ids)
    with Float64():
        out: Tensor = model.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=12, max_new_tokens=12
        )
    return out


@pytest.mark.parametrize(("name", "kv_heads"), _CONVERSIONS)
def test_the_result_is_the_source_with_merged_heads(source: Path, name: str, kv_heads: int) -> None:
    expected, actual = _models(source, name, kv_heads)
    ids = random_ids(expected)
    assert_close(full_logits(actual, ids), full_logits(expected, ids), atol=1e-10)


@pytest.mark.parametrize("name", _CASES)
def test_the_result_decodes_the_same_tokens_with_fewer_cached_heads(
    source: Path, name: str
) -> None:
    expected, actual = _models(source, name, kv_heads=1)
    ids = random_ids(expected)
    assert_equal(_generate(actual, ids), _generate(expected, ids))
    cache = DynamicCache(config=actual.config)
    with torch.no_grad(), Float64():
        actual(ids, past_key_values=cache, use_cache=True)
    width = expected.config.hidden_size // expected.config.num_attention_heads
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (len(ids), 1, ids.shape[1], width)


@pytest.mark.parametrize("name", _CASES)
def test_the_result_pads_on_the_left_as_the_source_does(source: Path, name: str) -> None:
    expected, actual = _models(source, name, kv_heads=1)
    ids = random_ids(expected)
    padded = torch.nn.functional.pad(ids, (3, 0), value=expected.config.pad_token_id)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    positions = (torch.arange(padded.shape[1]) - 3).clamp(min=0).expand_as(padded)
    one, other = (
        full_logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
        for model in (expected, actual)
    )
    assert_close(other, one, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in _CASES if ":" not in name])
def test_checkpoints_without_prefix_and_with_old_buffers_give_the_same(
    source: Path, name: str
) -> None:
    facts, tensors = facts_of(source)
    target = _target(source, name, 1)
    plain = apply(tensors, facts, target, lambda layer: merged(layer, 1))
    base = facts.family.base
    old = {key.removeprefix(base): tensor for key, tensor in tensors.items()}
    for buffer in _BUFFERS.get(name, ()):
        old[facts.family.layer_prefix.format(layer=1).removeprefix(base) + buffer] = torch.ones(1)
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    bare_facts, named = facts_of(source)
    bare = apply(named, bare_facts, _target(source, name, 1), lambda layer: merged(layer, 1))
    assert bare.keys() == plain.keys()
    for key, tensor in plain.items():
        assert_equal(bare[key], tensor)


@pytest.mark.parametrize("name", [name for name in _CASES if family(name) != "falcon"])
def test_the_config_has_no_key_that_its_class_does_not_know(source: Path, name: str) -> None:
    config = _target(source, name, 1).edit(read_json(source / "config.json"))
    stock = CONFIG_MAPPING[config["model_type"]]
    legacy = {"rope_theta", "partial_rotary_factor"}
    known = {key for parent in stock.__mro__ for key in getattr(parent, "__annotations__", {})}
    assert config.keys() - legacy <= known | {"model_type", "transformers_version"}
    assert "auto_map" not in config


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gpt_neox", ("hidden_dropout", "hidden_dropout", "attention_dropout")),
        ("gpt_neox:sequential", ("hidden_dropout", "hidden_dropout", "attention_dropout")),
        ("gptj", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        ("codegen", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        ("gpt2", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        ("opt", ("dropout", None, "attention_dropout")),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_the_result_trains_with_the_dropout_of_the_source(
    source: Path, name: str, keys: tuple[str | None, ...], given: bool
) -> None:
    file = source / "config.json"
    config = read_json(file)
    for index, key in enumerate(dict.fromkeys(key for key in keys if key is not None)):
        config.pop(key)
        config |= {key: 0.25 + index / 8} if given else {}
    file.write_text(json.dumps(config))
    before = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    edited = _target(source, name, 1).edit(config)
    after = CONFIG_MAPPING[edited["model_type"]].from_dict(edited)
    names = {
        "phi": ("resid_pdrop", "embd_pdrop", "attention_dropout"),
        "starcoder2": ("residual_dropout", "embedding_dropout", "attention_dropout"),
        "gpt_bigcode": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    }[edited["model_type"]]
    for ours, theirs in zip(names, keys, strict=True):
        assert getattr(after, ours) == (0.0 if theirs is None else getattr(before, theirs))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gpt_neox", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("gpt_neox:sequential", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("gpt_neox", {"pad_token_id": 97}),
        ("gptj", {"pad_token_id": 97}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("opt", {"_remove_final_layer_norm": True}),
    ],
)
def test_a_carrier_that_would_not_be_exact_is_not_offered(
    source: Path, name: str, keys: Mapping[str, Any]
) -> None:
    config = read_json(source / "config.json")
    offered = [
        [t.model_type for t in targets_for(read_facts(c), kv_heads=1) if t.name == "native"]
        for c in (config, config | keys)
    ]
    assert offered == [[_CASES[name][0]], []]


def test_a_tensor_that_the_result_has_no_place_for_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9}
    (target, _) = targets_for(read_facts(config), kv_heads=1)
    for name in ("transformer.h.0.attn.extra.weight", "score.weight", "transformer.h.0.ln_1"):
        with pytest.raises(InputModelError, match=f"'{name}' has no place in a model of class"):
            target.rename(name)


@pytest.mark.parametrize("name", ["gpt_neox"])
def test_a_checkpoint_without_one_of_its_norms_is_refused(source: Path, name: str) -> None:
    facts, tensors = facts_of(source)
    target = _target(source, name, 2)
    for lost in target.folds:
        left = {key: t for key, t in tensors.items() if key != f"gpt_neox.layers.1.{lost}"}
        with pytest.raises(InputModelError, match=f"has no {lost}"):
            apply(left, facts, target, lambda layer: merged(layer, 2))
