"""Patched models of every kind in float64, with the ops written out, against the same unpatched.

The ops are exact here, so that what is tested is all that lies between a model and a kernel: masks
as spans, offsets of caches, windows, slopes, and which op is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

import kvpatch
from tests.families import tiny
from tests.families.stock import Float64, make, random_ids
from tests.helpers import assert_close
from tests.kvpatch import stock_latents
from tests.kvpatch.latents import latent_model
from tests.kvpatch.reference_ops import use_reference_ops
from tests.kvpatch.stacks import CLASSIC, converted, pairs
from tests.kvpatch.stacks import stock_model as deeper_model

TOKENS, STEPS = 9, [4, 1, 2, 1, 1]

_FALCON = {**tiny.settings("falcon"), "alibi": False}
_FALCONS = {
    "falcon:rope": _FALCON,
    "falcon:mqa": {**_FALCON, "multi_query": True, "parallel_attn": True},
    "falcon:grouped": {
        **_FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "parallel_attn": True,
        "num_ln_in_parallel_attn": 2,
    },
}
# ALiBi of Falcon cannot be said in slopes
STOCK = [*(name for name in tiny.MODELS if tiny.family(name) != "falcon"), *_FALCONS]
GROUPED = [f"{name} grouped" for name in CLASSIC if name != "falcon"]
_LATENT = ("llama", "gemma2", "gptj", "bloom", "opt", "gpt_neo", "qwen3", "olmo2")
LATENT = [f"{name} latent" for name in _LATENT]
MLA = [name for name in stock_latents.MODELS if name not in {"deepseek_v2:compressed"}]


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return use_reference_ops(monkeypatch)


@pytest.fixture
def model(name: str, tmp_path: Path) -> Any:
    return _model(name, tmp_path)


def _model(name: str, folder: Path) -> Any:
    """Any model, in float64, with eager attention and experts."""
    source, _, kind = name.partition(" ")
    if kind == "grouped":
        return converted(source, deeper_model(source), 2, pairs(source))
    if kind == "latent":
        return latent_model(source, deeper_model(source), folder, pairs(source))
    if name in stock_latents.MODELS:
        model = stock_latents.stock_model(name)
    else:
        model = make(name, _FALCONS.get(name) or tiny.settings(name)).double()
    if tiny.family(name) not in {"falcon", "bloom", "mpt", "gptj", "gpt_neo", "codegen"}:
        model.set_attn_implementation("eager")
    if "experts" in "".join(key for key, _ in model.named_modules()):
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def _stepwise(model: Any, ids: Tensor, cache: Cache) -> Tensor:
    parts = [model(part, past_key_values=cache).logits for part in ids.split(STEPS, dim=1)]
    return torch.cat(parts, 1)


def _plain(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def _padded(*hidden: int) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        mask[0, list(hidden)] = 0
        logits: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
        return logits[mask.bool()]

    return run


def _packed(model: Any, ids: Tensor) -> Tensor:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(len(ids), -1)
    logits: Tensor = model(ids, position_ids=positions, use_cache=False).logits
    return logits


def _cached(model: Any, ids: Tensor) -> Tensor:
    return _stepwise(model, ids, DynamicCache())


def _forgetting(model: Any, ids: Tensor) -> Tensor:
    return _stepwise(model, ids, DynamicCache(config=model.config))


def _static(model: Any, ids: Tensor) -> Tensor:
    return _stepwise(model, ids, StaticCache(config=model.config, max_cache_len=TOKENS + 3))


RUNS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": _plain,
    "left": _padded(0, 1, 2),
    "right": _padded(7, 8),
    "between": _padded(3, 4),
    "packed": _packed,
    "cached": _cached,
    "forgetting": _forgetting,
    "static": _static,
}
_OLDEST = Version(transformers.__version__) < Version("5.23")
_NO_POSITIONS = {"bloom", "mpt"}


@torch.no_grad()
def _outcomes(model: Any, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    with Float64():
        return {name: RUNS[name](model, ids) for name in names}


@pytest.mark.parametrize("name", [*STOCK, *GROUPED, *LATENT, *MLA])
def test_logits_are_those_of_the_unpatched_model(name: str, model: Any, ops: list[str]) -> None:
    ids = random_ids(model, TOKENS)
    runs = list(RUNS)
    kind = tiny.family(name.partition(" ")[0])
    if kind in _NO_POSITIONS:
        runs.remove("packed")
    # the stock classes place a window by the length of a cache, and biases by that of a mask
    if name == "gpt_neo" or (kind == "bloom" and _OLDEST):
        runs.remove("static")
    wanted = _outcomes(model, ids, runs)
    alibi = name == "bloom latent"
    report = kvpatch.patch(model, strict=not alibi)
    assert len(report.modules) == model.config.num_hidden_layers
    assert len(report.fused) == (0 if alibi else len(report.modules))
    found = _outcomes(model, ids, runs)
    for run, logits in wanted.items():
        assert_close(found[run], logits, atol=1e-10)
    few = {"latent_decode"} if (name in LATENT and not alibi) or name in MLA else {"decode"}
    assert few | {"flash"} <= set(ops)
    kvpatch.unpatch(model)
    calls = len(ops)
    again = _outcomes(model, ids, ["plain"])
    assert_close(again["plain"], wanted["plain"], atol=0)
    assert len(ops) == calls


def test_a_window_does_not_depend_on_the_length_of_the_cache(ops: list[str]) -> None:
    model = make("gpt_neo", tiny.settings("gpt_neo")).double()
    ids = random_ids(model, TOKENS)
    wanted = _outcomes(model, ids, ["cached"])["cached"]
    kvpatch.patch(model)
    assert_close(_outcomes(model, ids, ["static"])["static"], wanted, atol=1e-10)


GENERATING = [
    "llama",
    "qwen2",
    "gemma2",
    "gptj",
    "bloom",
    "mpt",
    "llama grouped",
    "mpt grouped",
    "llama latent",
    "youtu",
    "deepseek_v2",
]


def _generated(model: Any, ids: Tensor, **how: Any) -> list[list[int]]:
    how = {"attention_mask": torch.ones_like(ids), "use_cache": True, **how}
    with Float64():
        out = model.generate(ids, max_new_tokens=7, min_new_tokens=7, do_sample=False, **how)
    return out.tolist()


@pytest.mark.parametrize("name", GENERATING)
def test_generation_gives_the_same_tokens(
    name: str, model: Any, ops: list[str], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    assistant = _model(name, tmp_path / "other")
    assistant.generation_config.num_assistant_tokens = 2
    ids = random_ids(model, 4).repeat(1, 2)
    padded = nn.functional.pad(ids, (3, 0))
    mask = nn.functional.pad(torch.ones_like(ids), (3, 0))
    ways: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "greedy": (ids, {}),
        "static": (ids, {"cache_implementation": "static", "disable_compile": True}),
        "beams": (ids, {"num_beams": 3}),
        "padded": (padded, {"attention_mask": mask}),
        "assisted": (ids[:1], {"assistant_model": assistant}),
        "looked up": (ids[:1], {"prompt_lookup_num_tokens": 3}),
        "in chunks": (ids, {"prefill_chunk_size": 3}),
    }
    if name == "gemma2":  # assistance crops caches with windows since 5.23 only
        del ways["assisted"], ways["looked up"]
    wanted = {way: _generated(model, start, **how) for way, (start, how) in ways.items()}
    kvpatch.patch(model, strict=True)
    found = {way: _generated(model, start, **how) for way, (start, how) in ways.items()}
    assert found == wanted
    assert ops
