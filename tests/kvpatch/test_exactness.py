"""Converted models compute what stock models compute, to 1e-10 in float64.

The truth is the stock class: with its own weights, with KV heads that are copies of one another in
place of fewer heads, and with a cache that hands a layer's keys and values to its readers in place
of shared layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpatch.models import FAMILIES
from tests.families import tiny
from tests.families.stock import Float64, random_ids
from tests.helpers import assert_close
from tests.kvpatch.stacks import (
    CLASSIC,
    MODELS,
    ReadingCache,
    converted,
    copied_heads,
    pairs,
    stock_model,
)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with Float64():
        out: Tensor = model(ids, **inputs).logits
    return out


def expected(stock: Any, sources: Sequence[int] | None, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of the stock model, whose cache makes layers share."""
    cache = ReadingCache(sources, stock.config)
    return logits(stock, ids, past_key_values=cache, use_cache=True, **inputs)


def test_there_is_a_model_of_every_family() -> None:
    assert set(CLASSIC) == set(FAMILIES)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MODELS)
def test_fewer_heads_are_heads_that_are_copies(name: str, kv_heads: int) -> None:
    stock = copied_heads(name, stock_model(name), kv_heads)
    ids = random_ids(stock)
    ours = converted(name, stock, kv_heads, None)
    assert_close(
        logits(ours, ids, use_cache=False), logits(stock, ids, use_cache=False), atol=1e-10
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", MODELS)
def test_shared_layers_read_the_keys_and_values_of_their_source(name: str, kv_heads: int) -> None:
    sources = pairs(name)
    stock = copied_heads(name, stock_model(name), kv_heads)
    ids = random_ids(stock)
    want = expected(stock, sources, ids)
    alone = expected(stock, None, ids)
    assert float((want - alone).abs().max()) > 1e-3, "sharing changed nothing"
    ours = converted(name, stock, kv_heads, sources)
    assert_close(logits(ours, ids, use_cache=False), want, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_is_masked_as_in_the_stock_model(name: str) -> None:
    sources, padding = pairs(name), 3
    stock = copied_heads(name, stock_model(name), 2)
    ids = random_ids(stock)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    want = expected(stock, sources, ids, attention_mask=mask)
    ours = converted(name, stock, 2, sources)
    have = logits(ours, ids, attention_mask=mask, use_cache=False)
    assert_close(have[0], want[0], atol=1e-10)
    assert_close(have[1, padding:], want[1, padding:], atol=1e-10)


@pytest.mark.parametrize("sources", [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 2, 0]])
def test_any_earlier_layer_can_be_a_source(sources: list[int]) -> None:
    stock = stock_model("llama")
    ids = random_ids(stock)
    ours = converted("llama", stock, tiny.SIZES["num_key_value_heads"], sources)
    assert_close(logits(ours, ids), expected(stock, sources, ids), atol=1e-10)
