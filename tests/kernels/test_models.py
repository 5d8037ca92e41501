"""Tiny models of every kind with kernels in them, against the same models without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import kvpatch
from kvpatch.attention import fused
from tests.families import tiny
from tests.families.stock import make, random_ids
from tests.kernels.measures import relative_error
from tests.kvpatch import stock_latents
from tests.kvpatch.latents import latent_model
from tests.kvpatch.stacks import converted, pairs
from tests.kvpatch.stacks import stock_model as deeper_model

TOKENS, STEPS = 7, [5, 1, 1]


def _grouped(name: str) -> Any:
    """A stock model of two layers with a window and a cap on its scores, and with shared heads."""
    return make(name, {**tiny.settings(name), "num_key_value_heads": 2})


MAKERS: dict[str, Callable[[Path], Any]] = {
    "MHA": lambda folder: make("llama", tiny.settings("llama")),
    "GQA, window, softcap": lambda folder: _grouped("gemma2"),
    "MQA, ALiBi, CLA": lambda folder: converted("bloom", deeper_model("bloom"), 1, pairs("bloom")),
    "ALiBi that bypasses": lambda folder: make("mpt", tiny.settings("mpt")),
    "GQA, CLA": lambda folder: converted("llama", deeper_model("llama"), 2, pairs("llama")),
    "MLA": lambda folder: latent_model("gemma2", deeper_model("gemma2"), folder),
    "normed MLA": lambda folder: latent_model("qwen3", deeper_model("qwen3"), folder),
    "stock MLA": lambda folder: stock_latents.stock_model("youtu"),
}


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that are called, in order."""
    calls: list[str] = []
    genuine = fused.attend

    def recording(op: str, *operands: Any, **how: Any) -> Tensor:
        calls.append(op)
        return genuine(op, *operands, **how)

    monkeypatch.setattr(fused, "attend", recording)
    return calls


@pytest.fixture
def model(kind: str, tmp_path: Path, device: str) -> Any:
    return MAKERS[kind](tmp_path).float().to(device)


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Of a forward pass with gradients and padding on the left, and of steps with two caches."""
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    outcomes = [model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].detach()]
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), StaticCache(model.config, 9)):
            parts = [model(part, past_key_values=cache).logits for part in ids.split(STEPS, 1)]
            outcomes.append(torch.cat(parts, 1).flatten(0, 1))
    return torch.cat(outcomes)


@pytest.mark.parametrize("kind", MAKERS)
def test_logits_are_those_of_the_unpatched_model(
    kind: str, model: Any, ops: list[str], device: str
) -> None:
    ids = random_ids(model, TOKENS).to(device)
    wanted = _logits(model, ids)
    report = kvpatch.patch(model, strict=True)
    assert len(report.fused) == len(report.modules)
    found = _logits(model, ids)
    assert relative_error(found, wanted) < 1e-5
    assert {"flash", "latent_decode" if "MLA" in kind else "decode"} <= set(ops)


@pytest.mark.parametrize("kind", ["GQA, CLA", "stock MLA"])
def test_generation_gives_the_same_tokens(model: Any, ops: list[str], device: str) -> None:
    ids = random_ids(model, 4, batch=1).to(device)

    def tokens() -> list[int]:
        how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        numbers: list[int] = out[0].tolist()
        return numbers

    wanted = tokens()
    kvpatch.patch(model, strict=True)
    assert tokens() == wanted
    assert ops


@pytest.mark.parametrize("kind", ["GQA, CLA", "stock MLA"])
def test_gradients_are_those_of_the_unpatched_model(
    model: Any, ops: list[str], device: str
) -> None:
    ids = random_ids(model, TOKENS).to(device)
    ours = copy.deepcopy(model)
    kvpatch.patch(ours, strict=True)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    for trained in (model, ours):
        trained.train()
        trained(ids, labels=ids, use_cache=False).loss.backward()
    found = dict(ours.named_parameters())
    for name, weight in model.named_parameters():
        assert relative_error(found[name].grad, weight.grad) < 1e-4, name
    assert set(ops) == {"flash"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["GQA, CLA"])
def test_a_layer_compiles_into_one_graph(model: Any, device: str) -> None:
    kvpatch.patch(model, strict=True)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, TOKENS, model.config.hidden_size, device=device)
    angles = model.model.rotary_emb(hidden, torch.arange(TOKENS, device=device)[None])
    attention.mode = None  # nothing is handed down here

    def run(states: Tensor) -> Tensor:
        output: Tensor = attention(states, position_embeddings=angles, attention_mask=None)[0]
        return output

    wanted = run(hidden)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(hidden), wanted) < 1e-6
    compiled(hidden.requires_grad_()).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
