"""What is patched and what is not, and that it leaves no trace."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import kvpatch
from kvpatch.attention.latent import STOCK, AbsorbedDecoding, absorbed_class
from kvpatch.errors import UsageError
from tests.families.stock import full_logits, make, random_ids
from tests.helpers import assert_close
from tests.kvpatch.stock_latents import (
    LAYERS,
    PLAIN,
    SIZES,
    attentions,
    count_absorbed_calls,
    stepwise,
    stock_model,
)


@pytest.fixture
def model(name: str) -> Any:
    return stock_model(name)


@pytest.fixture
def absorbed_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    return count_absorbed_calls(monkeypatch)


@pytest.mark.parametrize("name", ["youtu", "minicpm3:compressed"])
@pytest.mark.parametrize("target", ["o_proj", "kv_b_proj", "kv_a_proj_with_mqa"])
def test_adapters_count_where_they_are(
    model: Any, target: str, absorbed_calls: list[tuple[int, int]]
) -> None:
    peft = pytest.importorskip("peft")
    ids = random_ids(model, 7)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    ).eval()
    full = full_logits(adapted, ids)
    report = kvpatch.patch(adapted)
    assert_close(stepwise(adapted, ids, DynamicCache(), [4, 1, 2]), full, atol=1e-10)
    if target != "kv_b_proj":
        assert len(report.absorbed) == LAYERS
        assert absorbed_calls
        return
    assert not absorbed_calls
    assert len(report.expanded) == LAYERS
    assert "kv_b_proj is not a plain linear layer" in str(report)
    with pytest.raises(UsageError, match="not every attention module"):
        kvpatch.patch(adapted, strict=True)
    merged = adapted.merge_and_unload()
    assert_close(stepwise(merged, ids, DynamicCache(), [4, 1, 2]), full, atol=1e-10)
    assert absorbed_calls


def _hooked(up: nn.Linear) -> None:
    up.register_forward_hook(lambda module, inputs, output: output * 2)


def _replaced(up: nn.Linear) -> None:
    up.forward = lambda x: 2 * nn.functional.linear(x, up.weight)


def _parametrized(up: nn.Linear) -> None:
    torch.nn.utils.parametrizations.weight_norm(up)
    with torch.no_grad():
        up.get_parameter("parametrizations.weight.original0").mul_(2)


def _biased(up: nn.Linear) -> None:
    up.bias = nn.Parameter(torch.ones(up.out_features, dtype=up.weight.dtype))


@pytest.mark.parametrize("name", ["deepseek_v3"])
@pytest.mark.parametrize("change", [_hooked, _replaced, _parametrized, _biased])
def test_what_the_weight_does_not_say_is_left_to_the_stock_class(
    model: Any, change: Callable[[nn.Linear], None], absorbed_calls: list[tuple[int, int]]
) -> None:
    ids = random_ids(model, 6)
    kvpatch.patch(model)
    for attention in attentions(model):
        change(attention.kv_b_proj)
    logits = stepwise(model, ids, DynamicCache(), [4, 1, 1])
    assert not absorbed_calls
    assert len(kvpatch.patch(model).expanded) == LAYERS
    kvpatch.unpatch(model)
    assert_close(logits, full_logits(model, ids), atol=1e-10)


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_other_attention_functions_are_left_to_the_stock_class(model: Any) -> None:
    model.set_attn_implementation("flex_attention")
    report = kvpatch.patch(model)
    assert not report.absorbed
    assert "flex_attention" in str(report)
    model.set_attn_implementation("sdpa")
    assert len(kvpatch.patch(model).absorbed) == LAYERS


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("argument", ["position_bias", "softcap", "s_aux", "cache"])
def test_arguments_that_change_the_scores_are_left_to_the_stock_class(
    model: Any, argument: str, absorbed_calls: list[tuple[int, int]]
) -> None:
    ids = random_ids(model, 6)
    kvpatch.patch(model)
    stepwise(model, ids, DynamicCache(), [4, 1, 1], **{argument: torch.zeros(())})
    assert not absorbed_calls
    stepwise(model, ids, DynamicCache(), [4, 1, 1], **{argument: None})
    assert absorbed_calls


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@torch.no_grad()
def test_arguments_may_come_by_position(model: Any, name: str) -> None:
    """In the order that the stock class has, which differs among the classes."""
    attention = attentions(model)[0]
    hidden = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0)).double()
    angles = model.model.rotary_emb(hidden, torch.tensor([[5]]))
    mask = torch.zeros(1, 1, 1, 6).double()
    mask[..., 2] = -1e9

    def output() -> Tensor:
        cache = DynamicCache()
        model(random_ids(model, 5, batch=1), past_key_values=cache)
        by_position = (angles, mask) if name == "deepseek_v3" else (mask,)
        named = {} if name == "deepseek_v3" else {"position_embeddings": angles}
        states: Tensor = attention(hidden, *by_position, past_key_values=cache, **named)[0]
        return states

    wanted = output()
    kvpatch.patch(model)
    assert_close(output(), wanted, atol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_unpatching_gives_the_stock_class_back(model: Any, name: str) -> None:
    other = stock_model(name)
    before = [type(attention) for attention in attentions(model)]
    names = tuple(f"model.layers.{layer}.self_attn" for layer in range(LAYERS))
    first, second = kvpatch.patch(model), kvpatch.patch(model)
    assert first == second
    assert tuple(first.absorbed) == names
    assert all(isinstance(a, AbsorbedDecoding) for a in attentions(model))
    assert all(isinstance(a, b) for a, b in zip(attentions(model), before, strict=True))
    assert [type(attention) for attention in attentions(other)] == before
    assert kvpatch.unpatch(model) == names
    assert [type(attention) for attention in attentions(model)] == before
    assert kvpatch.unpatch(model) == ()


@pytest.mark.parametrize("name", ["youtu"])
def test_a_with_block_undoes_what_it_did_and_no_more(model: Any) -> None:
    first, second = attentions(model)
    kvpatch.patch(first)

    def fail_inside() -> None:
        with kvpatch.patched(model) as report:
            assert len(report.absorbed) == LAYERS
            assert isinstance(second, AbsorbedDecoding)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert isinstance(first, AbsorbedDecoding)
    assert not isinstance(second, AbsorbedDecoding)


@pytest.mark.parametrize("name", PLAIN)
def test_copies_and_saved_files_are_what_they_were(
    model: Any, absorbed_calls: list[tuple[int, int]], tmp_path: Path
) -> None:
    ids = random_ids(model, 6)
    full = full_logits(model, ids)
    model.save_pretrained(tmp_path / "stock")
    kvpatch.patch(model)
    model.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "stock").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()

    kept = pickle.dumps(model)
    absorbed_class.cache_clear()  # as in a process that has not patched anything yet
    for twin in (copy.deepcopy(model), pickle.loads(kept)):
        absorbed_calls.clear()
        assert_close(stepwise(twin, ids, DynamicCache(), [4, 1, 1]), full, atol=1e-10)
        assert absorbed_calls
        assert len(kvpatch.unpatch(twin)) == LAYERS


class DecoyAttention(nn.Module):
    """Looks like MLA, by name and by weights."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj = nn.Linear(2, 2)


@pytest.mark.parametrize("name", ["youtu"])
def test_what_is_not_patched_is_named(model: Any) -> None:
    with pytest.raises(UsageError, match=r"DecoyAttention has no absorbed form") as error:
        kvpatch.patch(nn.ModuleDict({"decoy": DecoyAttention()}))
    assert all(row.name in str(error.value.hint) for row in STOCK)
    with pytest.raises(UsageError, match="LlamaAttention has no latents"):
        kvpatch.patch(make("llama", {k: v for k, v in SIZES.items() if "dim" not in k}))
    with pytest.raises(UsageError, match="no attention module of this Linear"):
        kvpatch.patch(nn.Linear(2, 2))

    mixed = nn.ModuleDict({"model": model, "decoy": DecoyAttention()})
    with pytest.raises(UsageError, match="decoy: not patched"):
        kvpatch.patch(mixed, strict=True)
    assert not any(isinstance(module, AbsorbedDecoding) for module in mixed.modules())
    report = kvpatch.patch(mixed)
    assert list(report.left) == ["decoy"]
    assert str(report).startswith("2 of 3 attention modules")


@pytest.mark.parametrize("name", ["youtu"])
def test_a_forward_that_others_replaced_is_not_lost(model: Any) -> None:
    first, second = attentions(model)
    genuine = first.forward
    first.forward = genuine
    report = kvpatch.patch(model)
    assert list(report.left) == ["model.layers.0.self_attn"]
    second.forward = second.forward
    with pytest.raises(UsageError, match=r"model\.layers\.1\.self_attn was replaced"):
        kvpatch.unpatch(model)
    del second.forward
    assert kvpatch.unpatch(model) == ("model.layers.1.self_attn",)


def test_importing_the_package_imports_no_torch() -> None:
    script = (
        "import sys, kvpatch\n"
        "assert 'torch' not in sys.modules\n"
        "from kvpatch import Report, patch, patched, unpatch\n"
        "assert kvpatch.patch is patch and 'torch' in sys.modules\n"
        "try: kvpatch.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('found nothing')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
