"""Recipes that calibrate: sizes of their results by formulas of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from tests.recipes.dry_runs import FOLDER, RECIPES, Hollow, dry_run
from tests.recipes.shapes import PUBLISHED, PublishedModel

_LLAMA, _SMOLLM = "meta-llama/Llama-2-7b-hf", "HuggingFaceTB/SmolLM2-1.7B"


@dataclass(frozen=True)
class Expected:
    """What a recipe makes: its source, class, numbers cached of a token, and parameters."""

    source: str
    architecture: str
    cached: int
    parameters: Callable[[PublishedModel], int]


def _heads(model: PublishedModel) -> tuple[int, int, int, int]:
    """Layers, hidden width, query heads and head width."""
    c = model.config
    return c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"], model.head_dim


def _fewer_rows(rows: int) -> Callable[[PublishedModel], int]:
    """So many rows of keys and values less, in the model as a whole."""
    return lambda model: model.parameters - rows * _heads(model)[1]


def _latent(
    rank: int, rope: int, *, constant: int, biases: bool, norm: bool
) -> Callable[[PublishedModel], int]:
    """Keys and values of H heads of width D become a latent; queries get ``rope`` dims more."""

    def parameters(model: PublishedModel) -> int:
        layers, hidden, heads, dim = _heads(model)
        cached = rank + constant
        maps = heads * (dim + rope) * hidden  # queries
        maps += (cached + rope) * hidden + heads * 2 * dim * cached  # down and up
        maps += hidden * heads * dim  # output
        vectors = norm * cached
        if biases:
            vectors += cached + rope + hidden
            vectors += 0 if norm else heads * (dim + rope)  # a stock class has none on queries
        outside = model.parameters - sum(s[0] for s in model.buffers.values())
        return outside + layers * (maps + vectors - 4 * hidden * hidden)

    return parameters


_EXPECTED: Mapping[str, Expected] = {
    "smollm2-1.7b-gqa8-calibrated": Expected(
        _SMOLLM, "LlamaForCausalLM", 24 * 2 * 8 * 64, _fewer_rows(24 * 2 * 24 * 64)
    ),
    "smollm2-1.7b-cla2-calibrated": Expected(
        _SMOLLM, "KvpatchLlamaForCausalLM", 13 * 2 * 32 * 64, _fewer_rows(11 * 2 * 32 * 64)
    ),
    "smollm2-1.7b-mla-kvpatch": Expected(
        _SMOLLM,
        "KvpatchLlamaForCausalLM",
        24 * (448 + 64),
        _latent(448, 64, constant=0, biases=True, norm=False),
    ),
    "llama-2-7b-mla": Expected(
        _LLAMA,
        "DeepseekV3ForCausalLM",
        32 * (513 + 64),
        _latent(512, 64, constant=1, biases=True, norm=True),
    ),
    "llama-2-7b-mla-serving": Expected(
        _LLAMA,
        "DeepseekV3ForCausalLM",
        32 * (512 + 64),
        _latent(512, 64, constant=0, biases=False, norm=True),
    ),
}


def test_there_is_a_formula_for_each_calibrating_recipe() -> None:
    assert sorted(_EXPECTED) == sorted(
        path.stem for path in RECIPES if "\ncalibration:" in path.read_text()
    )


@pytest.mark.parametrize("name", _EXPECTED)
def test_dry_run_gives_the_right_numbers(name: str, hollow: Hollow) -> None:
    expected = _EXPECTED[name]
    plan, model = dry_run(FOLDER / f"{name}.yaml", hollow), PUBLISHED[expected.source]
    parameters = expected.parameters(model)
    assert plan["class"] == expected.architecture
    assert plan["kv_bytes_per_token"][1] == 2 * expected.cached
    assert plan["parameters"] == parameters
    assert plan["bytes"] == [2 * model.parameters, 2 * parameters]
    assert sum(plan["files"].values()) == 2 * parameters


def test_the_model_for_servers_is_one_that_they_load(hollow: Hollow) -> None:
    servers = dry_run(FOLDER / "llama-2-7b-mla-serving.yaml", hollow)["latent"]["servers"]
    assert servers == {
        name: f"{name} serves it as a DeepSeek model." for name in ("vLLM", "SGLang", "llama.cpp")
    }
    others = dry_run(FOLDER / "llama-2-7b-mla.yaml", hollow)["latent"]["servers"]
    assert all("does not serve it" in note for note in others.values())
