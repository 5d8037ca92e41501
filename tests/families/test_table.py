"""The rows of the family table against the stock config classes, key by key and layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from convert.facts import read_facts
from convert.families import FAMILIES, family_of
from kvpatch.errors import InputModelError
from tests.families.stock import attentions
from tests.families.tiny import MODELS, SIZES, family, settings

# 960 is no family's default and a multiple of all of them, so that "absent means one for each
# query head" and "absent means 32" give different head counts, and 8 is no family's head_dim.
_BARE = {"num_attention_heads": 960, "hidden_size": 7680, "num_hidden_layers": 8}
_TINY = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
_TINY |= {"num_experts": 2, "num_experts_per_tok": 1}  # no other family reads them
# what a family needs besides to be what it is, or to fit these sizes
_NEEDS: Mapping[str, Mapping[str, Any]] = {
    "falcon": {"alibi": True, "multi_query": False, "parallel_attn": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
_LONG = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}

# (model_type, keys as they stand in config.json files), by what they are about
_POSITIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "theta-4": ("llama", {"rope_theta": 5e4}),
    "theta-5": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "theta-5-beside": ("llama", {"rope_parameters": _LINEAR, "rope_theta": 5e4}),
    "scaling-4": ("llama", {"rope_theta": 5e4, "rope_scaling": _LINEAR}),
    "scaling-4-type": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "scaling-null": ("llama", {"rope_theta": 5e4, "rope_scaling": None}),
    "scaling-beside-5": (
        "llama",
        {"rope_scaling": _LINEAR, "rope_parameters": {"rope_theta": 5e4}},
    ),
    "scaling-yarn": ("qwen2", {"rope_theta": 1e6, "rope_scaling": _YARN}),
    "scaling-long": ("phi3", {"rope_scaling": {"type": "longrope", **_LONG}}),
    "scaling-su": (
        "phi3",
        {"rope_scaling": {"type": "su", "original_max_position_embeddings": 32, **_LONG}},
    ),
    "partial-4": ("phi", {"partial_rotary_factor": 0.34}),
    "partial-5": ("stablelm", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "partial-glm": ("glm", {"head_dim": 16, "partial_rotary_factor": 0.25}),
    "partial-nemotron": ("nemotron", {"head_dim": 16, "partial_rotary_factor": 0.25}),
    "partial-ignored": ("llama", {"partial_rotary_factor": 0.5}),
    "partial-phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "window-null": ("mistral", {"sliding_window": None}),
    "window-phi3": ("phi3", {"sliding_window": 5}),
    "window-mixtral": ("mixtral", {"sliding_window": 5}),
    "window-starcoder2": ("starcoder2", {"sliding_window": 5}),
    "switched-off-qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": 5}),
    "switched-off-qwen3_moe": ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 5}),
    "max-window-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "max-window-layers-qwen3": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "max-window-layers-moe": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "switched-on-default": ("qwen3", {"use_sliding_window": True, "num_hidden_layers": 30}),
    "switched-on-moe-default": ("qwen2_moe", {"use_sliding_window": True}),
    "switched-on-qwen3_moe": ("qwen3_moe", {"use_sliding_window": True}),
    "layer-types": (
        "gemma2",
        {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 4},
    ),
    "layer-types-null": ("gemma2", {"sliding_window": 5, "layer_types": None}),
    "pattern-ignored": ("gemma2", {"sliding_window": 5, "sliding_window_pattern": 3}),
    "pattern": ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 3}),
    "local-theta": ("gemma3_text", {"rope_theta": 2e6, "rope_local_base_freq": 3e4}),
    "local-theta-default": ("gemma3_text", {"rope_theta": 2e6}),
    "global-theta-default": ("gemma3_text", {"rope_local_base_freq": 3e4}),
    "global-scaling": (
        "gemma3_text",
        {"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": _LINEAR},
    ),
    "nested-rope": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {**_LINEAR, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            }
        },
    ),
    "nested-rope-null": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": _LINEAR, "sliding_attention": None}},
    ),
    "olmo3-scaling": ("olmo3", {"rope_theta": 7e5, "rope_scaling": _YARN}),
    "olmo3-nested": (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {**_YARN, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            }
        },
    ),
    "nope-interval": ("smollm3", {"no_rope_layer_interval": 3}),
    "nope-list": ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 0, 0, 1, 1]}),
    "nope-window": ("smollm3", {"use_sliding_window": True, "sliding_window": 5}),
    "nope-window-off": ("smollm3", {"use_sliding_window": False, "sliding_window": 5}),
}


@pytest.fixture(params=_POSITIONS)
def legacy(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One of the configs in ``_POSITIONS``, eight tiny layers if it does not say otherwise."""
    model_type, keys = _POSITIONS[request.param]
    return {"model_type": model_type, **_TINY, "num_hidden_layers": 8, **keys}


def _stock(config: Mapping[str, Any]) -> Any:
    keys = {key: value for key, value in config.items() if key != "model_type"}
    return CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(keys))  # it changes them


def _rotations(model: Any) -> list[Tensor | None]:
    """Frequencies of every layer as the stock model has them in memory; None if it has none."""
    config, rotary = model.config, getattr(model.base_model, "rotary_emb", None)
    if hasattr(attentions(model)[0], "embed_positions"):  # sines in front, of angles up to one
        sines = [attention.embed_positions[1].chunk(2)[0] for attention in attentions(model)]
        return [table.asin() for table in sines]
    if rotary is None or getattr(config, "alibi", False):
        return [None] * config.num_hidden_layers
    rotates = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    return [
        getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", None)) if turns else None
        for kind, turns in zip(_layer_types(config), rotates, strict=True)
    ]


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or [""] * config.num_hidden_layers


def _stock_windows(config: Any) -> tuple[int | None, ...]:
    """What the stock mask and cache code makes of a config: layer_types, else the window alone."""
    if config.model_type == "gpt_neo":
        return tuple(config.window_size if k == "local" else None for k in config.attention_layers)
    window = getattr(config, "sliding_window", None)
    everywhere = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or everywhere
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _stock_scale(attention: Any) -> float:
    """The factor on the scores, under the name that the module at hand gives it."""
    if hasattr(attention, "scale_attn"):
        return 1 / float(attention.scale_attn)
    names = ("scaling", "softmax_scale", "inv_norm_factor")
    return next((float(getattr(attention, n)) for n in names if hasattr(attention, n)), 1.0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_architecture_is_the_stock_causal_lm(model_type: str) -> None:
    row = FAMILIES[model_type]
    assert row.model_type == model_type
    assert row.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_the_stock_class(model_type: str) -> None:
    stock = CONFIG_MAPPING[model_type]
    # the attribute of the class, since __post_init__ may overwrite that of the instance
    expected = {key: getattr(stock, key) for key in FAMILIES[model_type].defaults}
    assert FAMILIES[model_type].defaults == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_mean_what_they_mean_in_transformers(model_type: str) -> None:
    bare = {**_BARE, **_NEEDS.get(model_type, {})}
    facts = read_facts({"model_type": model_type, **bare})
    stock = CONFIG_MAPPING[model_type](**bare)
    heads, width = stock.num_attention_heads, stock.hidden_size // stock.num_attention_heads
    assert facts.geometry.kv_heads == (getattr(stock, "num_key_value_heads", None) or heads)
    assert facts.geometry.head_dim == (getattr(stock, "head_dim", None) or width)
    assert facts.tied == stock.tie_word_embeddings
    assert facts.softcap == getattr(stock, "attn_logit_softcapping", None)
    assert facts.clip == getattr(stock, "clip_qkv", None)
    assert facts.residual_multiplier == getattr(stock, "residual_multiplier", 1.0)
    assert facts.windows == _stock_windows(stock)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_context_means_what_it_means_in_transformers(model_type: str) -> None:
    bare = {**_BARE, **_NEEDS.get(model_type, {})}
    stock = CONFIG_MAPPING[model_type](**bare)
    name = {"bloom": "seq_length", "mpt": "max_seq_len"}.get(model_type, "max_position_embeddings")
    context = read_facts({"model_type": model_type, **bare}).context
    assert context == getattr(stock, name, 2048)  # BLOOM has no longest sequence


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_rope_keys_mean_what_they_mean_in_transformers(model_type: str) -> None:
    # 8 layers have a layer without RoPE and a full one in every family that has such
    config = {"model_type": model_type, **_TINY, "hidden_size": 64, "num_hidden_layers": 8}
    config |= _NEEDS.get(model_type, {})
    _assert_stock_positions(config | {"num_key_value_heads": 4})


@pytest.mark.parametrize("name", MODELS)
def test_facts_of_saved_configs_are_those_of_the_stock_class(name: str) -> None:
    stock = CONFIG_MAPPING[family(name)](**settings(name))
    _assert_stock_positions(stock.to_dict())


def test_facts_of_legacy_configs_are_those_of_the_stock_class(legacy: dict[str, Any]) -> None:
    _assert_stock_positions(legacy | {"num_key_value_heads": 4})


def _assert_stock_positions(config: dict[str, Any]) -> None:
    """``read_facts`` sees the frequencies, windows and scale that the stock model runs with."""
    facts, stock = read_facts(config), _stock(config)
    model = AutoModelForCausalLM.from_config(stock)
    assert facts.windows == _stock_windows(stock)
    for scale, attention in zip(facts.scales, attentions(model), strict=True):
        assert scale == pytest.approx(_stock_scale(attention), rel=1e-12)
    types = _layer_types(stock)
    for layer, frequencies in enumerate(_rotations(model)):
        rope = facts.ropes[layer]
        if frequencies is None:
            assert rope.dim == 0
            continue
        flat = getattr(stock, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
        parameters = flat.get(types[layer], flat)
        assert (rope.kind, rope.theta) == (parameters["rope_type"], parameters["rope_theta"])
        assert rope.dim == 2 * len(frequencies)
        if rope.kind == "default":
            expected = rope.theta ** (-torch.arange(0, rope.dim, 2) / rope.dim)
            torch.testing.assert_close(frequencies, expected)


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("gpt2", {"n_embd": 24, "n_head": 2, "n_layer": 3, "n_positions": 33}),
        ("gpt2", {"n_embd": 24, "hidden_size": 36, "n_head": 2, "num_attention_heads": 3}),
        ("gptj", {"n_embd": 24, "n_head": 2, "n_layer": 3, "n_positions": 33, "rotary_dim": 8}),
        ("gptj", {"n_embd": 24, "n_head": 2, "rotary_dim": 8, "rope_theta": 7.0}),
        ("codegen", {"n_embd": 96, "n_head": 4, "n_layer": 3, "rotary_dim": 8}),
        ("gpt_neo", {"hidden_size": 24, "num_heads": 2, "num_layers": 24, "window_size": 9}),
        ("gpt_neo", {"num_heads": 2, "num_layers": 3, "attention_types": [[["local"], 3]]}),
        (
            "gpt_neo",
            {
                "num_layers": 2,
                "attention_layers": ["local"] * 2,
                "attention_types": [[["global"], 2]],
            },
        ),
        ("bloom", {"n_embed": 24, "hidden_size": 36, "n_head": 2, "n_layer": 3}),
        ("bloom", {"n_embed": 24, "num_attention_heads": 3, "n_head": 2, "n_layer": 3}),
        ("bloom", {"hidden_size": 36, "n_head": 3, "num_hidden_layers": 3, "n_layer": 2}),
        ("mpt", {"d_model": 24, "n_heads": 2, "n_layers": 3, "max_seq_len": 33}),
        ("mpt", {"d_model": 24, "n_heads": 2, "attn_config": {"clip_qkv": 3.0}}),
        ("mpt", {"d_model": 24, "n_heads": 2, "attn_config": {"softmax_scale": 0.3}}),
        ("mpt", {"d_model": 24, "n_heads": 2, "attn_config": None}),
        (
            "falcon",
            {**_NEEDS["falcon"], "n_embed": 24, "hidden_size": 36, "num_attention_heads": 2},
        ),
        ("gpt_neox", {"hidden_size": 64, "num_attention_heads": 2, "rotary_pct": 0.5}),
        ("gpt_neox", {"hidden_size": 64, "num_attention_heads": 2, "rotary_emb_base": 7e3}),
        ("gpt_neox", {"hidden_size": 64, "num_attention_heads": 2, "rope_theta": 7e3}),
        ("persimmon", {"hidden_size": 64, "num_attention_heads": 2, "rope_theta": 25e3}),
        ("opt", {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
)
def test_keys_go_by_the_names_of_the_stock_class(model_type: str, keys: dict[str, Any]) -> None:
    config = {"model_type": model_type, **keys}
    stock = _stock(config)
    # sizes that this config.json leaves out, so that the model is small
    small = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "vocab_size": 9}
    aliases = {"n_embd", "n_embed", "d_model"}, {"n_head", "n_heads", "num_heads"}
    layers = {"n_layer", "n_layers", "num_layers"}
    given = {
        "hidden_size": aliases[0],
        "num_attention_heads": aliases[1],
        "num_hidden_layers": layers,
    }
    config |= {k: v for k, v in small.items() if not keys.keys() & {k, *given.get(k, ())}}
    stock, facts = _stock(config), read_facts(config)
    assert facts.geometry.hidden == stock.hidden_size
    assert facts.geometry.heads == facts.geometry.kv_heads == stock.num_attention_heads
    assert facts.layers == stock.num_hidden_layers
    longest = ("max_position_embeddings", "max_seq_len")
    assert facts.context in [getattr(stock, name) for name in longest if hasattr(stock, name)] or (
        model_type == "bloom"
    )
    nested = getattr(stock, "attn_config", None)
    assert facts.clip == getattr(nested, "clip_qkv", None)
    _assert_stock_positions(config)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "xglm"}, "'xglm' is not supported"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is an encoder-decoder"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3 caches a latent already"),
        ({"model_type": "gemma3", "text_config": {}}, "'gemma3' wraps a text model"),
        ({"model_type": "no_such_model"}, "'no_such_model' is not supported"),
        ({}, "no model_type"),
        ({"model_type": 7}, "no model_type"),
    ],
    ids=lambda value: value.get("model_type", "absent") if isinstance(value, dict) else "",
)
def test_other_models_are_refused_by_name(config: dict[str, Any], why: str) -> None:
    with pytest.raises(InputModelError, match=re.escape(why)) as refused:
        family_of(config)
    assert refused.value.hint is not None
    listed = re.search(r"Supported: ([\w, ]+)\.", refused.value.hint)
    assert listed is not None
    assert listed[1].split(", ") == sorted(FAMILIES)


def test_every_family_has_tiny_models() -> None:
    assert {family(name) for name in MODELS} == set(FAMILIES)
