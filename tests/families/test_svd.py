"""The svd merge on every family: exact where it must be, and refused where it would not be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import convert, make_recipe
from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from convert.families import pack, unpack
from convert.methods.svd import Grouping, svd_merge
from kvpatch.errors import UsageError
from tests.families.stock import Checkpoints, change_kv_heads, full_logits, load, make, random_ids
from tests.families.tiny import GROUPED, settings
from tests.helpers import assert_close

_CLIPPED = [name for name in GROUPED if "clip" in name]
_FREE = [name for name in GROUPED if "clip" not in name]


def _merged(source: Path, out: Path, kv_heads: int, grouping: Grouping = "adjacent") -> Path:
    """Merge in float64 throughout, so that what is exact can be seen to be exact."""
    config = read_json(source / "config.json")
    facts = read_facts(config)
    method = svd_merge(kv_heads=kv_heads, grouping=grouping)
    shutil.copytree(source, out)
    tensors = {n: t.double() for n, t in load_file(source / "model.safetensors").items()}
    for layer in range(facts.layers):
        attention = unpack(tensors, facts.family, facts.geometry, layer, rope=facts.ropes[layer])
        for name in pack(attention, facts.family, layer):
            del tensors[name]
        tensors |= pack(method.convert([attention], None)[0][0], facts.family, layer)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"num_key_value_heads": kv_heads}))
    return out


def _assert_same_function(one: Path, other: Path) -> None:
    first, second = load(one), load(other)
    ids = random_ids(first)
    # logits are of order one; the floor of 1e-12 on weights and metrics is what remains
    assert_close(full_logits(second, ids), full_logits(first, ids), atol=1e-9)


@pytest.mark.parametrize("name", _FREE)
def test_merging_to_the_same_heads_changes_nothing(
    checkpoint: Checkpoints, tmp_path: Path, name: str
) -> None:
    source = checkpoint(name)
    _assert_same_function(source, _merged(source, tmp_path / "same", 4))


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", _FREE)
def test_heads_that_are_copies_merge_without_loss(tmp_path: Path, name: str, kv_heads: int) -> None:
    model = make(name, settings(name), seed=2)
    change_kv_heads(model, kv_heads, lambda heads: heads[0], dtype=torch.float32)
    model.save_pretrained(tmp_path / "copies")
    out = _merged(tmp_path / "copies", tmp_path / "merged", kv_heads)
    _assert_same_function(tmp_path / "copies", out)


@pytest.mark.parametrize("name", ["llama", "phi", "cohere", "starcoder2", "phi3", "qwen2"])
def test_copies_that_are_not_neighbours_find_each_other(tmp_path: Path, name: str) -> None:
    """Heads 0 and 3, and 1 and 2, are copies: only regrouping merges them without loss."""
    model = make(name, settings(name), seed=2)
    change_kv_heads(model, 1, lambda heads: heads[0], dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    _scatter(tmp_path / "model")
    similar = _merged(tmp_path / "model", tmp_path / "similar", 2, "similar")
    _assert_same_function(tmp_path / "model", similar)
    adjacent = _merged(tmp_path / "model", tmp_path / "adjacent", 2)
    with pytest.raises(AssertionError, match="largest difference"):
        _assert_same_function(tmp_path / "model", adjacent)


def _scatter(folder: Path) -> None:
    """Give KV heads 1 and 2 of a model whose heads are all equal other weights, equal to each."""
    facts = read_facts(read_json(folder / "config.json"))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for layer in range(facts.layers):
        attention = unpack(tensors, facts.family, facts.geometry, layer)
        for heads in (attention.k, attention.v):
            assert heads is not None
            heads[1:3] = torch.randn(heads.shape[1:], generator=generator)
        tensors |= pack(attention, facts.family, layer)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", _FREE)
def test_the_command_writes_what_the_method_gives(
    checkpoint: Checkpoints, tmp_path: Path, name: str
) -> None:
    source = checkpoint(name)
    recipe = {"method": "gqa", "kv_heads": 2, "merge": "svd", "source": str(source)}
    written = convert(make_recipe({**recipe, "output": str(tmp_path / "out")}))
    expected = load_file(_merged(source, tmp_path / "expected", 2) / "model.safetensors")
    actual = load_file(written / "model.safetensors")
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        # rounded to float32 once; both runs do the same float64 sums
        assert_close(actual[key].double(), tensor, atol=1e-6 * float(tensor.abs().max()))


@pytest.mark.parametrize("name", _CLIPPED)
def test_clipping_is_refused_by_name(checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    recipe = {"method": "mqa", "merge": "svd", "source": str(checkpoint(name))}
    with pytest.raises(UsageError, match="clip_qkv"):
        convert(make_recipe({**recipe, "output": str(tmp_path / "out")}))


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "stablelm:norm-bias", "phi:norm-tied"])
def test_regrouping_normed_keys_is_refused_by_name(
    checkpoint: Checkpoints, tmp_path: Path, name: str
) -> None:
    keys = {"method": "gqa", "kv_heads": 2, "merge": "svd", "group": "similar"}
    source, out = str(checkpoint(name)), str(tmp_path / "out")
    with pytest.raises(UsageError, match="queries and keys have a norm"):
        convert(make_recipe({**keys, "source": source, "output": out}))


@pytest.mark.parametrize(
    "name", ["llama:bias-tied", "qwen2", "phi", "cohere", "glm4", "nemotron:bias-tied", "phi3"]
)
def test_heads_that_differ_by_a_turn_of_each_plane_merge_without_loss(
    tmp_path: Path, name: str
) -> None:
    """Keys that are complex multiples of one another: only the conjugate in the query is right."""
    model = make(name, settings(name), seed=2)
    change_kv_heads(model, 2, lambda heads: heads[0], dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    facts = read_facts(read_json(tmp_path / "model" / "config.json"))
    tensors = {n: t.double() for n, t in load_file(tmp_path / "model/model.safetensors").items()}
    generator = torch.Generator().manual_seed(4)
    for layer in range(facts.layers):
        rope = facts.ropes[layer]
        attention = unpack(tensors, facts.family, facts.geometry, layer)
        for head in range(4):
            factor = torch.randn(rope.dim // 2, 2, generator=generator, dtype=torch.float64)
            for rows in (attention.k, attention.k_bias):
                if rows is not None:
                    _turn(rows[head], factor, interleaved=rope.interleaved)
        tensors |= pack(attention, facts.family, layer)
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    out = _merged(tmp_path / "model", tmp_path / "merged", 2)
    _assert_same_function(tmp_path / "model", out)


def _turn(head: torch.Tensor, factor: torch.Tensor, *, interleaved: bool) -> None:
    """Multiply plane f of a head, in place, by factor[f, 0] + i factor[f, 1], written out."""
    planes = len(factor)
    for f in range(planes):
        i, j = (2 * f, 2 * f + 1) if interleaved else (f, f + planes)
        a, b = head[i].clone(), head[j].clone()
        head[i] = factor[f, 0] * a - factor[f, 1] * b
        head[j] = factor[f, 1] * a + factor[f, 0] * b
