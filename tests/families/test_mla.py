"""Conversion to latents through the whole pipeline, on every family: what nothing is lost by.

The ladder: with a latent as wide as the input and every rotary dim kept, the result computes the
stock class of the source, in float64. Rotations so slow that they are none can be cut without loss.
Everything between is compared with that class too, by how far it is from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from convert import convert, make_recipe
from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from convert.targets.dense_blocks import stock_config
from convert.targets.rope_tables import rope_table
from convert.verify import cache_bytes, verify_checkpoint
from tests.families.stock import full_logits, load, make, random_ids
from tests.families.texts import random_text, token_ids, write_tokenizer
from tests.families.tiny import GROUPED, MODELS, family, settings
from tests.helpers import assert_close, load_folder
from tests.targets.classes import EXPERTS
from tests.targets.latent_sources import real_float64

_ALIBI = {"bloom", "mpt", "falcon"}
_OTHERS = {"gemma2", "olmo:bias-clip", "phi:norm-tied", "persimmon"}
_ACCEPTED = [
    name for name in MODELS if name not in _OTHERS and family(name) not in _ALIBI | EXPERTS
]
# queries and keys with a norm, so that constants of keys take a dim of the latent
_NORMED = {name for name in _ACCEPTED if family(name) in {"qwen3", "gemma3_text", "olmo2", "olmo3"}}
_NORMED |= {"stablelm:norm-bias", "cohere:norm-bias-untied"}
# of two KV heads, or of all together
_SCALES = {name: 1 if "olmo" in name else 2 for name in _NORMED}
_PLAINEST = [name for name in _ACCEPTED if ":" not in name or ":norm" in name]
# blocks that are those of DeepSeek up to factors, without windows
_NATIVE = ["llama", "llama:bias-tied", "mistral", "qwen2", "gemma", "gemma:bias-untied", "phi3"]
_NATIVE += ["granite", "granite:bias-tied", "smollm3", "glm", "glm:nobias-tied", "helium"]
_NATIVE += ["helium:bias-tied", "ernie4_5"]

_SAMPLES, _CONTEXT, _TEXT = 6, 32, 1200
_NEVER = 1e12  # tokens of a period, about

# folder of a model in float64, by name, KV heads (None: its own) and further settings
Source = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    @cache
    def saved(name: str, kv_heads: int | None = None, **changed: Any) -> Path:
        changed |= {} if kv_heads is None else {"num_key_value_heads": kv_heads}
        return _save(tmp_path_factory.mktemp("mla") / "model", name, changed)

    return saved


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text(random_text(_TEXT, seed=0))
    return file


def _save(
    folder: Path, name: str, changed: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> Path:
    make(name, {**settings(name), **changed}, seed=5).to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _mla(
    source: Path, out: Path, *, text: Path | None = None, wide: bool = False, **keys: Any
) -> Path:
    """Convert with ``text`` if there is one, without refits unless they are asked for.

    If ``wide``, everything is in float64, also the frequencies that DeepSeek's class is given.
    """
    if text is not None:
        calibration = {"calibration": str(text), "samples": _SAMPLES, "context": _CONTEXT}
        keys = {**calibration, "refit": "none", **keys}
    recipe = {"method": "mla", "source": str(source), "output": str(out), **keys}
    with real_float64() if wide else nullcontext():
        convert(make_recipe(recipe))
    return out


def _whole(source: Path) -> dict[str, Any]:
    """Sizes that leave nothing out."""
    facts = read_facts(read_json(source / "config.json"))
    turning = max(rope.dim for rope in facts.ropes)
    constant = any(key.endswith("k_proj.bias") for key in load_file(source / "model.safetensors"))
    rank = facts.geometry.hidden + int(constant and facts.qk_norm is not None)
    return {"rank": rank, "rope_dims": facts.geometry.kv_heads * turning}


def _assert_same(source: Path, result: Path, atol: float = 1e-9) -> None:
    expected, actual = load(source), load(result)
    ids = random_ids(expected, 14)
    assert_close(full_logits(actual, ids), full_logits(expected, ids), atol=atol)


def _class(folder: Path) -> str:
    (name,) = read_json(folder / "config.json")["architectures"]
    return str(name)


@pytest.mark.parametrize("name", _ACCEPTED)
def test_nothing_is_lost_where_nothing_is_left_out(
    source: Source, tmp_path: Path, name: str
) -> None:
    model = source(name)
    result = _mla(model, tmp_path / "out", target="kvpatch", **_whole(model))
    assert _class(result).startswith("Kvpatch")
    _assert_same(model, result)


@pytest.mark.parametrize("name", _PLAINEST)
def test_nothing_is_lost_of_grouped_heads_by_calibration(
    source: Source, tmp_path: Path, text: Path, name: str
) -> None:
    model = source(name, 2 if name in GROUPED else None)
    result = _mla(model, tmp_path / "out", text=text, target="kvpatch", **_whole(model))
    _assert_same(model, result)


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "text"])
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm"])
def test_nothing_is_lost_beside_a_layer_that_does_nothing(
    source: Source, tmp_path: Path, text: Path, part: str, calibrated: bool
) -> None:
    """Pruned models have such layers, and those that were made deeper and begin as they were."""
    model = load(source("llama"))
    for name, weight in model.model.layers[1].named_parameters():
        if name.endswith(f"{part}.weight"):
            weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    whole = _whole(tmp_path / "model")
    result = _mla(
        tmp_path / "model", tmp_path / "out", text=text if calibrated else None, wide=True, **whole
    )
    _assert_same(tmp_path / "model", result)


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "text"])
@pytest.mark.parametrize("name", _NATIVE)
def test_deepseeks_class_computes_the_source(
    source: Source, tmp_path: Path, text: Path, name: str, calibrated: bool
) -> None:
    model = source(name, 2 if calibrated else None)
    result = _mla(
        model, tmp_path / "out", text=text if calibrated else None, wide=True, **_whole(model)
    )
    assert _class(result) == "DeepseekV3ForCausalLM"
    _assert_same(model, result)


def test_one_kv_head_and_youtu(source: Source, tmp_path: Path) -> None:
    model = source("qwen2", 1)
    result = _mla(model, tmp_path / "out", arch="youtu", wide=True, **_whole(model))
    assert _class(result) == "YoutuForCausalLM"
    _assert_same(model, result)


@pytest.mark.parametrize("name", _PLAINEST)
def test_a_smaller_result_runs_and_caches_what_is_planned(
    source: Source, tmp_path: Path, text: Path, name: str
) -> None:
    wide = {"sliding_window": 64} if family(name) in {"gemma3_text", "olmo3"} else {}
    model = source(name, 2 if name in GROUPED else None, **wide)
    most = _whole(model)
    sizes: dict[str, Any] = {"rank": 13, "rope_dims": most["rope_dims"] // 4 * 2}
    result = _mla(model, tmp_path / "out", text=text, **sizes)
    checks = {check.name: check for check in verify_checkpoint(result, model)}
    assert {check.status for check in checks.values()} == {"ok"}, checks
    cache = read_manifest(result)["kv_cache"]
    assert cache["latent"] == sizes | ({"key_scales": _SCALES[name]} if name in _NORMED else {})
    assert cache["bytes_per_token"] == [_held(model), _held(result)]
    assert len(read_manifest(result)["layers"]) == len(cache["kv_source_layers"])


@torch.no_grad()
def _held(folder: Path) -> int:
    """Bytes that a token takes in the cache of a model in its own dtype."""
    model = load(folder)
    held = DynamicCache(config=model.config)
    with real_float64():
        model(torch.full((1, 8), 5), past_key_values=held)
    return cache_bytes(held) // 8


def _error(source: Path, result: Path, seed: int = 1) -> float:
    """Squared error of the logits on random text, relative; with seed 0 that of the calibration."""
    windows = _TEXT // _CONTEXT
    ids = token_ids(random_text(_TEXT, seed=seed))[: windows * _CONTEXT].view(windows, _CONTEXT)
    expected, actual = full_logits(load(source), ids), full_logits(load(result), ids)
    assert torch.isfinite(actual).all()
    return float((actual - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("name", ["qwen2", "gptj", "stablelm", "qwen3"])
def test_the_more_is_kept_the_nearer_is_the_source(
    source: Source, tmp_path: Path, text: Path, name: str
) -> None:
    model = source(name)
    keys: dict[str, Any] = {"text": text, "target": "kvpatch"}
    whole = _whole(model)
    rope = whole["rope_dims"]
    wanted = [(4, 2), (20, rope // 8 * 2), (36, rope // 4 * 2), (whole["rank"], rope)]
    errors = [
        _error(model, _mla(model, tmp_path / str(rank), rank=rank, rope_dims=dims, **keys))
        for rank, dims in wanted
    ]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-2] > 1e-3, "nothing was lost: the comparison is empty"
    assert errors[-1] < 1e-20


@pytest.mark.parametrize(
    ("name", "refits"),
    [("llama", "q qo"), ("gpt2", "qo"), ("qwen3:bias-window", "q qo"), ("olmo2", "q qo")],
)
def test_refits_lose_less_on_their_text(
    source: Source, tmp_path: Path, text: Path, name: str, refits: str
) -> None:
    model = source(name)
    keys: dict[str, Any] = {
        "rank": 16,
        "rope_dims": min(8, _whole(model)["rope_dims"]),
        "target": "kvpatch",
    }
    errors = {}
    for refit in ("none", *refits.split()):
        out = tmp_path / refit
        _mla(model, out, text=text, refit=refit, samples=_TEXT // _CONTEXT, **keys)
        errors[refit] = _error(model, out, seed=0)
        layers = read_manifest(out)["layers"]
        assert all({"attention_kl", "output_error"} <= layer.keys() for layer in layers)
    assert all(errors[refit] < 0.97 * errors["none"] for refit in refits.split()), errors
    if "qo" not in errors:
        return
    assert errors["qo"] == min(errors.values()), errors
    assert errors["qo"] < 0.85 * errors["none"], errors


@pytest.mark.parametrize(
    ("name", "refit"),
    [
        ("llama", "q"),
        ("gpt2", "q"),
        ("gpt2", "qo"),
        ("qwen3", "qo"),
        ("cohere:norm-bias-untied", "q"),
    ],
)
def test_refits_leave_what_lost_nothing(
    source: Source, tmp_path: Path, text: Path, name: str, refit: str
) -> None:
    """Weights are float32 in refits, so that their rounding is all that may change."""
    model = source(name)
    keys = {**_whole(model), "target": "kvpatch", "samples": _TEXT // _CONTEXT}
    result = _mla(model, tmp_path / "out", text=text, refit=refit, **keys)
    _assert_same(model, result, atol=1e-3)


def test_both_classes_compute_the_same_refitted_model(
    source: Source, tmp_path: Path, text: Path
) -> None:
    """With layers without positions, too, whose rotary pairs must stay zero."""
    model = source("smollm3", 2)
    keys = {**_whole(model), "rank": 16, "text": text, "refit": "qo", "samples": 6}
    ours = _mla(model, tmp_path / "ours", target="kvpatch", wide=True, **keys)
    native = _mla(model, tmp_path / "native", target="native", wide=True, **keys)
    assert _error(model, ours) > 1e-4, "nothing was lost: the comparison is empty"
    _assert_same(ours, native)


def _longrope(planes: int, factor: float) -> dict[str, Any]:
    # the factor on cosines and sines is sqrt(1 + ln 4 / ln 16) = 1.22
    lists = {"short_factor": [factor] * planes, "long_factor": [factor] * planes}
    return {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **lists}


_ORIGINAL = {"original_max_position_embeddings": 16}
_SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn": ("llama", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **_ORIGINAL}),
    "linear": ("qwen2", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "longrope": ("phi3", {**_longrope(6, 2.0), **_ORIGINAL}),
}


def _scaled(folder: Path, name: str, parameters: Mapping[str, Any]) -> Path:
    changed: dict[str, Any] = {"rope_parameters": dict(parameters), "num_key_value_heads": 2}
    if parameters["rope_type"] == "longrope":
        changed |= _ORIGINAL
    return _save(folder, name, changed)


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "text"])
@pytest.mark.parametrize("target", ["native", "kvpatch"])
@pytest.mark.parametrize("kind", _SCALED)
def test_scaled_rope(tmp_path: Path, text: Path, kind: str, target: str, calibrated: bool) -> None:
    model = _scaled(tmp_path / "source", *_SCALED[kind])
    keys = {**_whole(model), "text": text if calibrated else None, "target": target}
    result = _mla(model, tmp_path / "out", wide=target == "native", **keys)
    _assert_same(model, result)


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "text"])
@pytest.mark.parametrize("target", ["native", "kvpatch"])
@pytest.mark.parametrize("kind", ["linear", "longrope"])
def test_keys_that_do_not_turn_are_cut_without_loss(
    tmp_path: Path, text: Path, kind: str, target: str, calibrated: bool
) -> None:
    """Also where cosines and sines have a factor, which cut keys must keep."""
    name, parameters = _SCALED[kind]
    still = _longrope(6, _NEVER) | _ORIGINAL if kind == "longrope" else {"factor": _NEVER}
    model = _scaled(tmp_path / "source", name, {**parameters, **still})
    read = text if calibrated else None
    sizes = {**_whole(model), "rope_dims": 2}
    _assert_same(model, _mla(model, tmp_path / "out", text=read, target=target, **sizes))


def test_dynamic_rope_stays_with_a_class_of_ours(tmp_path: Path) -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = _scaled(tmp_path / "source", "llama", parameters)
    result = _mla(model, tmp_path / "out", **_whole(model))
    assert _class(result) == "KvpatchLlamaForCausalLM"
    _assert_same(model, result)


def test_layers_of_different_kinds_have_frequencies_of_their_own() -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = {**settings("gemma3_text"), "rope_parameters": parameters}
    model = make("gemma3_text", config)
    facts = read_facts({**model.config.to_dict(), "model_type": "gemma3_text"})
    stock = stock_config(facts)
    for number, kind in enumerate(model.config.layer_types):
        expected = getattr(model.model.rotary_emb, f"{kind}_inv_freq")
        assert_close(rope_table(facts, stock, number).short, expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "target"), [("llama", "native"), ("llama", "kvpatch"), ("qwen3", "kvpatch")]
)
@torch.no_grad()
def test_other_dtypes_err_as_the_source_does(
    tmp_path: Path, name: str, target: str, dtype: torch.dtype
) -> None:
    model = _save(tmp_path / "source", name, {"head_dim": 16}, dtype)
    result = _mla(model, tmp_path / "out", target=target, **_whole(model))
    ids = random_ids(load(model), 32, batch=8)
    exact: Tensor = full_logits(load(model), ids)
    own, converted = (
        float((load_folder(folder, dtype)(ids).logits.double() - exact).abs().mean())
        for folder in (model, result)
    )
    assert converted <= 2 * own + 1e-6
