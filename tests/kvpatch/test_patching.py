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
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpatch
from kvpatch.attention.stock import Swapped
from kvpatch.attention.survey import Route
from kvpatch.attention.swapping import swapped_class
from kvpatch.errors import UsageError
from kvpatch.models.attention_kvpatch import attention_class
from kvpatch.models.latent_kvpatch import LatentAttention
from tests.families.stock import full_logits, make, random_ids
from tests.families.tiny import settings
from tests.helpers import assert_close
from tests.kvpatch import stacks
from tests.kvpatch.latents import latent_model
from tests.kvpatch.reference_ops import use_reference_ops
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


def decoding(report: kvpatch.Report) -> list[str]:
    return [route.decode for route in report.modules.values()]


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
        assert decoding(report) == ["torch, on latents"] * LAYERS
        assert absorbed_calls
        return
    assert not absorbed_calls
    assert decoding(report) == ["torch, expanded"] * LAYERS
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
    assert decoding(kvpatch.patch(model)) == ["torch, expanded"] * LAYERS
    kvpatch.unpatch(model)
    assert_close(logits, full_logits(model, ids), atol=1e-10)


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_an_attention_function_that_is_set_later_is_left_to_the_stock_class(
    model: Any, absorbed_calls: list[tuple[int, int]]
) -> None:
    ids = random_ids(model, 6)
    full = full_logits(model, ids)
    kvpatch.patch(model)
    model.set_attn_implementation("eager")
    assert_close(stepwise(model, ids, DynamicCache(), [4, 1, 1]), full, atol=1e-10)
    assert not absorbed_calls
    kvpatch.unpatch(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("argument", ["position_bias", "softcap", "s_aux"])
def test_arguments_that_change_the_scores_are_left_to_the_stock_class(
    model: Any, argument: str, absorbed_calls: list[tuple[int, int]]
) -> None:
    ids = random_ids(model, 6)
    kvpatch.patch(model)
    number = 1.0 if argument == "softcap" else torch.zeros(())
    stepwise(model, ids, DynamicCache(), [4, 1, 1], **{argument: number})
    assert not absorbed_calls
    stepwise(model, ids, DynamicCache(), [4, 1, 1], **{argument: None})
    assert absorbed_calls


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@torch.no_grad()
def test_arguments_may_come_by_position(model: Any, name: str) -> None:
    """In the order that the stock class has, which differs among the classes."""
    model.set_attn_implementation("sdpa")
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
    assert tuple(first.modules) == names
    assert model.config._attn_implementation == "kvpatch_triton"
    assert all(isinstance(a, Swapped) for a in attentions(model))
    assert all(isinstance(a, b) for a, b in zip(attentions(model), before, strict=True))
    assert [type(attention) for attention in attentions(other)] == before
    assert kvpatch.unpatch(model) == names
    assert [type(attention) for attention in attentions(model)] == before
    assert model.config._attn_implementation == "eager"
    assert kvpatch.unpatch(model) == ()


@pytest.mark.parametrize("name", ["youtu"])
def test_a_with_block_undoes_what_it_did_and_no_more(name: str) -> None:
    first, second = stock_model(name), stock_model(name)
    kvpatch.patch(first)
    both = nn.ModuleList((first, second))

    def fail_inside() -> None:
        with kvpatch.patched(both) as report:
            assert len(report.modules) == 2 * LAYERS
            assert isinstance(attentions(second)[0], Swapped)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert isinstance(attentions(first)[0], Swapped)
    assert first.config._attn_implementation == "kvpatch_triton"
    assert not isinstance(attentions(second)[0], Swapped)
    assert second.config._attn_implementation == "eager"


def test_models_that_share_a_config_are_patched_alone() -> None:
    config = LlamaConfig(**SIZES)
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    assert first.config is second.config
    kvpatch.patch(first)
    assert second.config._attn_implementation == "sdpa"
    holders = [module.config for module in first.modules() if hasattr(module, "config")]
    assert all(held is first.config for held in holders)
    assert second.model.layers[0].self_attn.config is second.config


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
    swapped_class.cache_clear()  # as in a process that has not patched anything yet
    for twin in (copy.deepcopy(model), pickle.loads(kept)):
        absorbed_calls.clear()
        assert_close(stepwise(twin, ids, DynamicCache(), [4, 1, 1]), full, atol=1e-10)
        assert absorbed_calls
        assert len(kvpatch.unpatch(twin)) == LAYERS
        assert twin.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_converted_models_are_pickled(name: str, tmp_path: Path) -> None:
    model = latent_model(name, stacks.stock_model(name), tmp_path)
    ids = random_ids(model, 6)
    full = full_logits(model, ids)
    kvpatch.patch(model)
    kept = pickle.dumps(model)
    attention_class.cache_clear()  # as in a process that has not loaded such a model yet
    for twin in (copy.deepcopy(model), pickle.loads(kept)):
        assert_close(full_logits(twin, ids), full, atol=1e-10)
        assert kvpatch.unpatch(twin)


class DecoyAttention(nn.Module):
    """Looks like attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj = nn.Linear(2, 2)


@pytest.mark.parametrize("name", ["youtu"])
def test_what_is_not_patched_is_named(model: Any) -> None:
    with pytest.raises(UsageError, match="decoy: it is in no model of transformers"):
        kvpatch.patch(nn.ModuleDict({"decoy": DecoyAttention()}))
    with pytest.raises(UsageError, match="no attention module of this Linear"):
        kvpatch.patch(nn.Linear(2, 2))
    falcon = make("falcon", settings("falcon"))
    with pytest.raises(UsageError, match="ALiBi biases are rounded"):
        kvpatch.patch(falcon)
    assert falcon.config._attn_implementation == "sdpa"

    mixed = nn.ModuleDict({"model": model, "decoy": DecoyAttention()})
    with pytest.raises(UsageError, match="decoy: prefill stock, decode stock"):
        kvpatch.patch(mixed, strict=True)
    assert not any(isinstance(module, Swapped) for module in mixed.modules())
    assert model.config._attn_implementation == "eager"
    report = kvpatch.patch(mixed)
    assert report.modules["decoy"].decode == "stock"
    assert "model.model.layers.0.self_attn and 1 more" in str(report)
    assert str(report).startswith("kernels compute all attention of 0 of 3 modules")


@pytest.mark.parametrize("name", ["youtu"])
def test_masks_are_for_all_modules_of_a_config(model: Any) -> None:
    """One that cannot read spans keeps the others from being patched."""
    attention = attentions(model)[1]
    attention.indexer = nn.Identity()
    with pytest.raises(UsageError) as error:
        kvpatch.patch(model)
    assert "layers.1.self_attn: it selects keys by an indexer" in str(error.value)
    assert "layers.0.self_attn: it has the masks of" in str(error.value)


@pytest.mark.parametrize("name", ["youtu"])
def test_strict_means_kernels_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="its device is cpu"):
        kvpatch.patch(model, strict=True)
    use_reference_ops(monkeypatch)
    report = kvpatch.patch(model, strict=True)
    assert set(report.modules.values()) == {Route("flash", "latent_decode")}
    assert len(report.fused) == LAYERS


def test_the_copy_of_our_class_in_a_checkpoint_is_known(tmp_path: Path) -> None:
    model = latent_model("llama", stacks.stock_model("llama"), tmp_path)
    with kvpatch.patched(model) as wanted:
        assert set(decoding(wanted)) == {"torch, on latents"}
    own = {name: of for name, of in vars(LatentAttention).items() if name != "__dict__"}
    copied: Any = type(LatentAttention.__name__, LatentAttention.__bases__, own)
    for module in attentions(model):
        _, stock = type(module).__bases__
        module.__class__ = type(type(module).__name__, (copied, stock), {})
        assert not isinstance(module, LatentAttention)
    assert kvpatch.patch(model) == wanted


@pytest.mark.parametrize("name", ["youtu"])
def test_a_forward_that_others_replaced_is_not_lost(
    model: Any, absorbed_calls: list[tuple[int, int]]
) -> None:
    ids = random_ids(model, 6)
    full = full_logits(model, ids)
    first, second = attentions(model)
    first.forward = first.forward
    report = kvpatch.patch(model)
    assert decoding(report) == ["torch", "torch, on latents"]
    assert not isinstance(first, Swapped)
    assert_close(stepwise(model, ids, DynamicCache(), [4, 1, 1]), full, atol=1e-10)
    assert len(absorbed_calls) == 2  # of the second layer
    second.forward = second.forward
    with pytest.raises(UsageError, match=r"model\.layers\.1\.self_attn was replaced"):
        kvpatch.unpatch(model)
    del second.forward
    assert len(kvpatch.unpatch(model)) == LAYERS


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


def test_the_attention_function_may_be_what_imports_transformers() -> None:
    script = (
        "from kvpatch.attention.interface import attention_forward\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "assert ALL_ATTENTION_FUNCTIONS['kvpatch_triton'] is attention_forward\n"
        "assert 'kvpatch_triton' in ALL_MASK_ATTENTION_FUNCTIONS\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
