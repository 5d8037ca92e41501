"""Exactness of conversion, rungs 1 and 2, and what a lossy conversion must compute instead.

All comparisons of logits are in float64 (see ``stock.Float64``): 1e-10 leaves room for sums in
another order only. The truth is always the stock class with its own weights changed in place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from convert.families import pack, unpack
from convert.methods.pool import pool
from tests.families.stock import (
    Checkpoints,
    Conversions,
    change_kv_heads,
    full_logits,
    load,
    make,
    random_ids,
)
from tests.families.tiny import GROUPED, settings
from tests.helpers import assert_close, assert_equal, load_folder

_MERGES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda heads: heads.mean(0),
    "first": lambda heads: heads[0],
}
_STORAGE_MODELS = (
    "llama:bias-tied",
    "qwen3_moe:bias-window",
    "olmoe:bias-clip",
    "phi3",
    "stablelm:norm-bias",
    "cohere:norm-bias-untied",
)


def _assert_same_function(one: Any, other: Any) -> None:
    ids = random_ids(one)
    assert_close(full_logits(one, ids), full_logits(other, ids), atol=1e-10)


def _assert_merged(
    source: Path, result: Path, kv_heads: int, merge: str, dtype: torch.dtype
) -> None:
    """The converted folder computes the source with merged heads, and not the source itself."""
    expected, actual = load(source), load(result)
    before = full_logits(expected, random_ids(expected))
    change_kv_heads(expected, kv_heads, _MERGES[merge], dtype=dtype)
    assert actual.config.num_key_value_heads == kv_heads
    _assert_same_function(actual, expected)
    lost = (full_logits(expected, random_ids(expected)) - before).abs().max()
    assert float(lost) > 1e-3, "the merge changed nothing: the comparison is empty"


@pytest.mark.parametrize("name", GROUPED)
def test_pooling_to_the_same_heads_changes_nothing(
    checkpoint: Checkpoints, tmp_path: Path, name: str
) -> None:
    source, folder = checkpoint(name), tmp_path / "same"
    facts = read_facts(read_json(source / "config.json"))
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, folder)
    for layer in range(facts.layers):
        attention = unpack(tensors, facts.family, facts.geometry, layer)
        tensors |= pack(pool([attention], kv_heads=4, merge="mean")[0], facts.family, layer)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    one, same = load_folder(source), load_folder(folder)
    ids = random_ids(one)
    with torch.no_grad():
        assert_equal(same(ids).logits, one(ids).logits)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", GROUPED)
def test_heads_that_are_copies_merge_without_loss(
    converted: Conversions, tmp_path: Path, name: str, kv_heads: int
) -> None:
    model = make(name, settings(name), seed=2)
    change_kv_heads(model, kv_heads, _MERGES["first"], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    _assert_same_function(load(converted(tmp_path, kv_heads)), load(tmp_path))


@pytest.mark.parametrize(("kv_heads", "merge"), [(2, "mean"), (1, "mean"), (2, "first")])
@pytest.mark.parametrize("name", GROUPED)
def test_result_is_the_stock_model_with_merged_heads(
    checkpoint: Checkpoints, converted: Conversions, name: str, kv_heads: int, merge: str
) -> None:
    source = checkpoint(name)
    result = converted(source, kv_heads, merge)
    _assert_merged(source, result, kv_heads, merge, torch.float32)


@pytest.mark.parametrize("name", GROUPED)
def test_a_gqa_source_converts_on(
    checkpoint: Checkpoints, converted: Conversions, name: str
) -> None:
    grouped = converted(checkpoint(name), 2)
    _assert_merged(grouped, converted(grouped, 1), 1, "mean", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _STORAGE_MODELS)
def test_merged_heads_are_rounded_once_to_the_stored_dtype(
    converted: Conversions, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    # groups of three: halving a rounded sum is exact, a third of it is not
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
    make(name, {**settings(name), **sizes}).to(dtype).save_pretrained(tmp_path)
    result = converted(tmp_path, 2)
    assert {t.dtype for t in load_file(result / "model.safetensors").values()} == {dtype}
    _assert_merged(tmp_path, result, 2, "mean", dtype)


@pytest.mark.parametrize("name", GROUPED)
def test_only_the_head_count_changes_in_the_config(
    checkpoint: Checkpoints, converted: Conversions, name: str
) -> None:
    source = checkpoint(name)
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (source, converted(source, 2))
    )
    before.pop("output_router_logits", None)  # says what a run returns, and is no part of a model
    assert after == before | {"num_key_value_heads": 2}
