"""What patched stock MLA models compute, against the stock classes themselves, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import kvpatch
from tests.families.stock import Float64, full_logits, random_ids
from tests.helpers import assert_close
from tests.kvpatch.stock_latents import (
    LAYERS,
    MODELS,
    PLAIN,
    attentions,
    count_absorbed_calls,
    generate,
    stepwise,
    stock_model,
)


@pytest.fixture
def model(name: str) -> Any:
    return stock_model(name)


@pytest.fixture
def absorbed_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    return count_absorbed_calls(monkeypatch)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_is_the_stock_forward(
    name: str, implementation: str, absorbed_calls: list[tuple[int, int]]
) -> None:
    model = stock_model(name, implementation)
    ids = random_ids(model, 11)
    full = full_logits(model, ids)
    report = kvpatch.patch(model)
    assert [route.decode for route in report.modules.values()] == ["torch, on latents"] * LAYERS
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        absorbed_calls.clear()
        logits = stepwise(model, ids, cache, [4, 1, 1, 2, 3])
        assert_close(logits, full, atol=1e-10)
        done = [(1, 5), (1, 6), (2, 8), (3, 11)]
        assert absorbed_calls == [call for call in done for _ in range(LAYERS)]
    assert_close(full_logits(model, ids), full, atol=1e-10)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_static_cache_gives_the_same_logits(
    name: str, implementation: str, absorbed_calls: list[tuple[int, int]]
) -> None:
    model = stock_model(name, implementation)
    ids = random_ids(model, 9)
    full = full_logits(model, ids)
    kvpatch.patch(model)
    for steps in ([4, 1, 1, 3], [9], [1] * 9):
        cache = StaticCache(config=model.config, max_cache_len=12)
        assert_close(stepwise(model, ids, cache, steps), full, atol=1e-10)
    assert (1, 12) in absorbed_calls


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_left_padding_hides_the_same_keys(
    name: str, implementation: str, absorbed_calls: list[tuple[int, int]]
) -> None:
    model = stock_model(name, implementation)
    ids = random_ids(model, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    full = full_logits(model, ids, attention_mask=mask, position_ids=positions)
    kvpatch.patch(model)
    cache, parts = DynamicCache(), []
    with Float64(), torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 9)):
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            parts.append(model(ids[:, start:end], past_key_values=cache, **inputs).logits)
    seen = mask.bool()
    assert_close(torch.cat(parts, 1)[seen], full[seen], atol=1e-10)
    assert absorbed_calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 3},
    ],
    ids=lambda how: next(iter(how), "greedy"),
)
def test_generation_gives_the_same_tokens(
    model: Any, how: dict[str, Any], absorbed_calls: list[tuple[int, int]]
) -> None:
    batch = 1 if "prompt_lookup_num_tokens" in how else 2
    ids = random_ids(model, 4, batch=batch).repeat(1, 2)  # gives the lookup something to find
    beams = {key: value for key, value in how.items() if key == "num_beams"}
    alone = generate(model, ids, use_cache=False, **beams)
    kvpatch.patch(model)
    assert generate(model, ids, **how) == alone
    assert absorbed_calls


@pytest.mark.parametrize("name", PLAIN)
def test_padded_and_assisted_generation_give_the_same_tokens(
    model: Any, name: str, absorbed_calls: list[tuple[int, int]]
) -> None:
    ids = random_ids(model, 6, batch=1)
    alone = generate(model, ids, use_cache=False)
    kvpatch.patch(model)
    assistant = stock_model(name)
    assistant.generation_config.num_assistant_tokens = 2  # so that it takes several rounds
    assert generate(model, ids, assistant_model=assistant) == alone
    assert any(queries > 1 for queries, _ in absorbed_calls)
    padded, mask = (nn.functional.pad(x, (3, 0)) for x in (ids, torch.ones_like(ids)))
    assert generate(model, padded, attention_mask=mask)[0][9:] == alone[0][6:]


@pytest.mark.parametrize("name", PLAIN)
def test_attention_weights_are_those_of_the_stock_class(model: Any) -> None:
    ids = random_ids(model, 6)

    @torch.no_grad()
    def last_weights() -> tuple[Tensor, ...]:
        cache = DynamicCache()
        with Float64():
            model(ids[:, :5], past_key_values=cache)
            out = model(ids[:, 5:], past_key_values=cache, output_attentions=True)
        weights: tuple[Tensor, ...] = out.attentions
        return weights

    stock = last_weights()
    kvpatch.patch(model)
    for found, wanted in zip(last_weights(), stock, strict=True):
        assert_close(found, wanted, atol=1e-10)


@pytest.mark.parametrize("name", PLAIN)
def test_half_precision_is_as_good_as_that_of_the_stock_class(model: Any) -> None:
    ids = random_ids(model, 24, batch=4)
    truth = full_logits(model, ids)
    model.bfloat16()

    @torch.no_grad()
    def error() -> float:
        cache = DynamicCache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(1, dim=1)]
        return float((torch.cat(parts, 1).double() - truth).square().mean().sqrt())

    stock = error()
    kvpatch.patch(model)
    assert error() < 1.25 * stock


@pytest.mark.parametrize("name", PLAIN)
def test_training_is_that_of_the_stock_class(
    model: Any, absorbed_calls: list[tuple[int, int]]
) -> None:
    model.set_attn_implementation("sdpa")  # which has no softmax in float32
    ids = random_ids(model, 7)

    def gradients(trained: Any) -> dict[str, Tensor]:
        trained.train()
        trained(ids, labels=ids, use_cache=True).loss.backward()
        return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}

    ours = copy.deepcopy(model)
    kvpatch.patch(ours)
    ours.gradient_checkpointing_enable()
    wanted, found = gradients(model), gradients(ours)
    ours.gradient_checkpointing_disable()  # it allows no cache
    stepwise(ours, ids, DynamicCache(), [4, 1, 2])
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert_close(found[key], gradient, atol=1e-10)
    assert not absorbed_calls


@pytest.mark.parametrize("name", PLAIN)
def test_weights_that_change_count_at_once(model: Any) -> None:
    ids = random_ids(model, 6)
    kvpatch.patch(model)
    stepwise(model, ids, DynamicCache(), [4, 1, 1])
    with torch.no_grad():
        for attention in attentions(model):
            attention.kv_b_proj.weight.mul_(-1.5)
        attention.kv_b_proj.weight = nn.Parameter(attention.kv_b_proj.weight.flip(0))
    logits = stepwise(model, ids, DynamicCache(), [4, 1, 1])
    kvpatch.unpatch(model)
    assert_close(logits, full_logits(model, ids), atol=1e-10)


@pytest.mark.parametrize("name", ["youtu"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_compiles_into_one_graph(model: Any, absorbed_calls: list[tuple[int, int]]) -> None:
    model.set_attn_implementation("sdpa")
    ids = random_ids(model, 7)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        kvpatch.patch(model)
        cache = StaticCache(config=model.config, max_cache_len=12)
        model(ids[:, :5], past_key_values=cache)
        step = torch.compile(model, backend="eager", fullgraph=True)
        for token in (5, 6):
            logits = step(ids[:, token : token + 1], past_key_values=cache).logits
            assert_close(logits[:, 0], full[:, token], atol=1e-6)  # positions are in float32
    assert absorbed_calls
