"""DeepSeek's stock class against the stock class of the source: a lossless latent form of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from convert.checkpoint.reader import read_json
from convert.layer import AttentionLayer, LatentLayer
from convert.methods.latent import embedded
from tests.families.stock import Float64, full_logits, load, random_ids
from tests.families.tiny import family
from tests.helpers import assert_close, assert_equal, load_folder, rewrite_tensors
from tests.targets.applying import facts_of
from tests.targets.latent_sources import (
    BIASED,
    FORMS,
    PLAIN,
    PLAINEST,
    SOURCES,
    assert_same,
    real_float64,
    save,
    target_of,
    write_latent,
    written_as,
)


@pytest.fixture
def source(tmp_path: Path, name: str) -> Path:
    """A stock model with biases of standard deviation 2."""
    return save(tmp_path / "source", name)


@pytest.mark.parametrize("name", SOURCES)
def test_the_result_computes_the_source(source: Path, tmp_path: Path, name: str) -> None:
    result = write_latent(source, tmp_path / "out")
    assert_same(source, result)
    config = read_json(result / "config.json")
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["q_lora_rank"] is not None) == (name in BIASED)


@pytest.mark.parametrize("name", SOURCES)
def test_youtu_computes_the_source(source: Path, tmp_path: Path, name: str) -> None:
    result = write_latent(source, tmp_path / "out", arch="youtu")
    assert_same(source, result)
    facts, _ = facts_of(source)
    tied = facts.tied and family(name) not in ("gemma", "granite")  # those scale one of the two
    assert ("lm_head.weight" in load_file(result / "model.safetensors")) != tied
    assert read_json(result / "config.json")["architectures"] == ["YoutuForCausalLM"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_file_without_biases_computes_the_source(source: Path, tmp_path: Path, name: str) -> None:
    result = write_latent(source, tmp_path / "out", inert="epsilon")
    assert_same(source, result)
    names = load_file(result / "model.safetensors").keys()
    assert not [key for key in names if key.endswith(".bias")]
    assert "lm_head.weight" in names
    assert read_json(result / "config.json")["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize(("name", "inert"), FORMS)
def test_float32_differs_by_rounding(source: Path, tmp_path: Path, name: str, inert: str) -> None:
    result = write_latent(source, tmp_path / "out", dtype="float32", inert=inert)
    expected, actual = load_folder(source), load_folder(result)
    ids = random_ids(expected)
    with torch.no_grad():
        assert_close(actual(ids).logits, expected(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "inert", "dtype"),
    [(name, "constant", dtype) for name in PLAINEST for dtype in ("bfloat16", "float16")]
    + [(name, "epsilon", "bfloat16") for name in PLAINEST if name in PLAIN],
)
@torch.no_grad()
def test_half_precision_errs_as_the_source_does(
    tmp_path: Path, name: str, dtype: str, inert: str
) -> None:
    half = getattr(torch, dtype)
    source = save(tmp_path / "source", name, half)
    result = write_latent(source, tmp_path / "out", dtype=dtype, inert=inert)
    truth = load(source)
    ids = random_ids(truth, 32, batch=16)
    exact = full_logits(truth, ids)
    own, converted = (
        float((load_folder(folder, half)(ids).logits.double() - exact).abs().mean())
        for folder in (source, result)
    )
    assert converted <= 1.5 * own


@torch.no_grad()
def _generate(model: Any, ids: Tensor) -> Tensor:
    """Twelve more tokens, the likeliest ones, with a cache."""
    out: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=12,
        max_new_tokens=12,
        pad_token_id=0,
    )
    return out


@pytest.mark.parametrize(("name", "inert"), FORMS)
def test_decoding_with_a_cache_gives_the_same_tokens(
    source: Path, tmp_path: Path, name: str, inert: str
) -> None:
    result = write_latent(source, tmp_path / "out", inert=inert)
    expected, actual = load(source), load(result)
    ids = random_ids(expected)
    with Float64():
        assert_equal(_generate(actual, ids), _generate(expected, ids))
        cache = DynamicCache(config=actual.config)
        with torch.no_grad():
            actual(ids, past_key_values=cache, use_cache=True)
    config = read_json(result / "config.json")
    for layer in cache.layers:
        assert layer.keys.shape == (len(ids), 1, ids.shape[1], config["kv_lora_rank"])
        assert layer.values.shape == (len(ids), 1, ids.shape[1], config["qk_rope_head_dim"])


_LISTS = {
    "short_factor": [1.0 + i / 7 for i in range(6)],
    "long_factor": [2.0 + i / 3 for i in range(6)],
}
_ROPES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 16, **_LISTS},
}


@pytest.mark.parametrize("inert", ["constant", "epsilon"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in _ROPES), ("mistral", "longrope"), ("glm:nobias-tied", "yarn")],
)
def test_scaled_positions_are_a_list_of_frequencies(
    tmp_path: Path, name: str, kind: str, inert: str
) -> None:
    rope = {"rope_theta": 300.0, **_ROPES[kind]}
    rope |= {"partial_rotary_factor": 0.5} if name.startswith("glm") else {}
    keys: dict[str, Any] = {"rope_parameters": rope, "head_dim": 12}
    source = save(tmp_path / "source", name, **keys)
    result = write_latent(source, tmp_path / "out", inert=inert)
    for tokens in (9, 16, 17, 40):
        assert_same(source, result, tokens=tokens)
    parameters = read_json(result / "config.json")["rope_parameters"]
    assert parameters["rope_type"] == "longrope"
    scaled = parameters["short_factor"] != parameters["long_factor"]
    assert scaled == (kind == "longrope")


def test_frequencies_change_where_those_of_the_source_do(tmp_path: Path) -> None:
    """Also if that is beyond the 64 tokens that the model was made for."""
    rope = {"rope_theta": 300.0, **_ROPES["longrope"], "original_max_position_embeddings": 100}
    source = save(tmp_path / "source", "llama", rope_parameters=rope, head_dim=12)
    result = write_latent(source, tmp_path / "out")
    for tokens in (64, 65, 100, 101):
        assert_same(source, result, tokens=tokens)


@pytest.mark.parametrize(
    ("low", "kind"), [(1.0, "longrope"), (1e-9, "default")], ids=["all", "none"]
)
def test_a_scaling_that_changes_no_plane_leaves_the_kind(
    tmp_path: Path, low: float, kind: str
) -> None:
    """Planes in their own order; llama3 scales those whose wavelength is above a bound."""
    scaling = {**_ROPES["llama3"], "low_freq_factor": low, "high_freq_factor": 4 * low}
    keys = {"rope_parameters": {"rope_theta": 300.0, **scaling}, "head_dim": 12}
    source = save(tmp_path / "source", "llama", num_key_value_heads=1, **keys)
    result = write_latent(source, tmp_path / "out")
    assert_same(source, result, tokens=40)
    assert read_json(result / "config.json")["rope_parameters"]["rope_type"] == kind


@pytest.mark.parametrize(
    ("planes", "kind", "theta"),
    [
        ((0, 1, 2, 3, 4, 5), "default", 1e4),
        ((0, 1, 2), "default", 1e4**0.5),
        ((0, 2, 4), "default", 1e4),
        ((0, 5), "default", 1e4 ** (5 / 3)),
        ((0,), "default", 1e4 ** (1 / 6)),
        ((1, 2), "longrope", 1.0),
        ((5, 3, 0), "longrope", 1.0),
        ((0, 1, 3), "longrope", 1.0),
    ],
)
def test_planes_on_a_grid_have_a_base_of_their_own(
    tmp_path: Path, planes: tuple[int, ...], kind: str, theta: float
) -> None:
    """The other planes read nothing in the source, so that it is the same without them."""
    source = save(tmp_path / "source", "llama", head_dim=12, num_key_value_heads=1)
    weights = load_file(source / "model.safetensors")
    lost = [p for p in range(6) if p not in planes]
    for name, weight in weights.items():
        if "q_proj" in name:
            heads = weight.view(4, 2, 6, -1)
            heads[:, :, lost] = 0
    rewrite_tensors(source, weights)
    facts, _ = facts_of(source)
    with real_float64():
        target = target_of(facts, planes=planes)
    assert target is not None
    kept = [dim for plane in planes for dim in (2 * plane, 2 * plane + 1)]

    def latent(layer: AttentionLayer) -> LatentLayer:
        whole = embedded(layer, facts.scales[0])
        return dataclasses.replace(
            whole,
            geometry=dataclasses.replace(whole.geometry, rope_dim=len(kept)),
            q=whole.q[:, kept],
            k_rope=whole.k_rope[kept],
            planes=planes,
        )

    assert_same(source, written_as(source, tmp_path / "out", target, latent))
    parameters = read_json(tmp_path / "out" / "config.json")["rope_parameters"]
    assert parameters["rope_type"] == kind
    assert parameters["rope_theta"] == pytest.approx(theta, rel=1e-12)
