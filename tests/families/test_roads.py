"""Every family through the whole pipeline, to fewer KV heads, in every class that can hold it.

Checkpoints are in float64 and stay so: what is exact can be seen to be exact. The truth is the
stock class of the source; for the written tensors, the engine in memory of ``tests/targets``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from convert import convert, make_recipe
from convert.inspection import describe, inspect_source
from convert.layer import AttentionLayer
from convert.methods.svd import svd_merge
from convert.targets import targets_for
from convert.verify import cache_bytes, verify_checkpoint
from kvpatch.errors import KvpatchError, UsageError
from tests.families.stock import (
    Checkpoints,
    Float64,
    change_kv_heads,
    full_logits,
    load,
    make,
    random_ids,
)
from tests.families.tiny import GROUPED, MODELS, family, settings
from tests.helpers import assert_close
from tests.targets.applying import MEAN_READS, apply, facts_of, merged
from tests.targets.classes import EXPERTS, PATCHED, stock_class

# model, class, KV heads and merge; native conversions of families that have a KV-head count are
# the subject of test_ladder.py and test_svd.py
_ROADS = [
    (name, target, kv_heads, merge)
    for name in MODELS
    for target in ("native", "kvpatch")
    for kv_heads in ((2,) if name in GROUPED else (2, 1))
    for merge in ("mean", "svd")
    if (name in PATCHED if target == "kvpatch" else stock_class(name, kv_heads))
    and not (target == "native" and name in GROUPED)
    and not (merge == "svd" and "clip" in name)
]
_each_road = pytest.mark.parametrize(("name", "target", "kv_heads", "merge"), _ROADS)
_MULTI_HEAD = [name for name in MODELS if name not in GROUPED]
_NO_STOCK = [(n, kv_heads) for n in MODELS for kv_heads in (2, 1) if not stock_class(n, kv_heads)]
_SVD_READS = frozenset({"q", "k", "v", "o", "q_norm", "k_norm"})

# folder of a model in float64, by name and the number of different KV heads; None for all different
Wide = Callable[[str, int | None], Path]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    @cache
    def saved(name: str, kv_heads: int | None) -> Path:
        folder = tmp_path_factory.mktemp("wide") / "model"
        model = make(name, settings(name), seed=2)
        if kv_heads is not None:
            change_kv_heads(model, kv_heads, lambda heads: heads[0], dtype=torch.float32)
        model.double().save_pretrained(folder)
        return folder

    return saved


def _convert(source: Path, out: Path, **keys: object) -> Path:
    recipe = {"method": "gqa", "source": str(source), "output": str(out), **keys}
    return convert(make_recipe(recipe))


@_each_road
def test_heads_that_are_copies_merge_without_loss(
    wide: Wide, tmp_path: Path, name: str, target: str, kv_heads: int, merge: str
) -> None:
    source = wide(name, kv_heads)
    out = _convert(source, tmp_path / "out", kv_heads=kv_heads, merge=merge, target=target)
    expected, actual = load(source), load(out)
    kept = stock_class(name, kv_heads) if target == "native" else f"kvpatch_{family(name)}"
    assert actual.config.model_type == kept
    ids = random_ids(expected)
    assert_close(full_logits(actual, ids), full_logits(expected, ids), atol=1e-9)


@_each_road
def test_written_tensors_are_those_of_the_engine_in_memory(
    wide: Wide, tmp_path: Path, name: str, target: str, kv_heads: int, merge: str
) -> None:
    source = wide(name, None)
    out = _convert(source, tmp_path / "out", kv_heads=kv_heads, merge=merge, target=target)
    facts, tensors = facts_of(source)
    (chosen,) = (t for t in targets_for(facts, kv_heads=kv_heads) if t.name == target)
    method, reads = _in_memory(merge, kv_heads)
    expected = apply(tensors, facts, chosen, method, reads=reads)
    written = load_file(out / "model.safetensors")
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        # the two may sum in another order
        assert_close(written[key], tensor, atol=1e-12 * max(1.0, float(tensor.abs().max())))


def _in_memory(
    merge: str, kv_heads: int
) -> tuple[Callable[[AttentionLayer], AttentionLayer], frozenset[str]]:
    """What becomes of a layer, and the canonical fields that it takes."""
    if merge == "mean":
        return lambda layer: merged(layer, kv_heads), MEAN_READS
    method = svd_merge(kv_heads=kv_heads, grouping="adjacent")
    return lambda layer: method.convert([layer], None)[0][0], _SVD_READS


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", _MULTI_HEAD)
def test_cached_decoding_is_the_full_forward_in_as_many_bytes_as_planned(
    wide: Wide, tmp_path: Path, name: str, kv_heads: int
) -> None:
    tokens, source = 12, wide(name, None)
    out = _convert(source, tmp_path / "out", kv_heads=kv_heads)
    model, before = load(out), load(source).config
    ids, held = random_ids(model, tokens), DynamicCache(config=model.config)
    assert_close(_stepwise(model, ids, held), full_logits(model, ids), atol=1e-10)
    # keys and values of two sequences, 8 bytes a number
    width = before.hidden_size // before.num_attention_heads
    token = 2 * kv_heads * width * 8 * before.num_hidden_layers
    assert cache_bytes(held) == 2 * tokens * token
    assert json.loads((out / "kvpatch.json").read_text())["kv_cache"]["bytes_per_token"][1] == token


@torch.no_grad()
def _stepwise(model: Any, ids: Tensor, held: Any) -> Tensor:
    """Logits of decoding with a cache, one token at a time."""
    with Float64():
        steps = [
            model(token, past_key_values=held, use_cache=True).logits
            for token in ids.split(1, dim=1)
        ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", _MULTI_HEAD)
def test_the_best_class_is_the_default_and_the_result_verifies(
    checkpoint: Checkpoints, tmp_path: Path, name: str, kv_heads: int
) -> None:
    source = checkpoint(name)
    default = _convert(source, tmp_path / "default", kv_heads=kv_heads)
    best = "native" if stock_class(name, kv_heads) else "kvpatch"
    named = _convert(source, tmp_path / "named", kv_heads=kv_heads, target=best)
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (default, named)]
    assert files[0] == files[1]
    checks = {check.name: check.status for check in verify_checkpoint(default, source)}
    assert checks.pop("tokens") == "skipped"  # a tiny model has no tokenizer
    assert set(checks.values()) == {"ok"}, checks


@pytest.mark.parametrize("name", [name for name in MODELS if ":" not in name])
def test_inspect_names_the_class_that_is_written(
    checkpoint: Checkpoints, tmp_path: Path, name: str
) -> None:
    facts, _ = inspect_source(str(checkpoint(name)))
    said = describe(facts)["conversions"]
    assert (said["gqa"]["kv_heads"], said["mqa"]["kv_heads"]) == ([1, 2], [1])
    for method, kv_heads in (("gqa", 2), ("mqa", 1)):
        out = _convert(checkpoint(name), tmp_path / method, kv_heads=kv_heads)
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == [said[method]["target"]]
    if family(name) in PATCHED and name not in GROUPED and not stock_class(name, 2):
        again, _ = inspect_source(str(tmp_path / "gqa"))
        assert set(describe(again)["conversions"].values()) == {None}


def _refused(source: Path, **keys: object) -> KvpatchError:
    with pytest.raises(UsageError) as caught:
        _convert(source, source.parent / "refused", **keys)
    assert not (source.parent / "refused").exists()
    return caught.value


@pytest.mark.parametrize(("name", "kv_heads"), _NO_STOCK)
def test_no_class_of_transformers_is_said(wide: Wide, name: str, kv_heads: int) -> None:
    error = _refused(wide(name, None), kv_heads=kv_heads, target="native")
    said = f"--target native: there is no such class for a {family(name)} model with {kv_heads} KV"
    assert error.message.startswith(said)
    assert error.hint == "Choose --target kvpatch."


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_no_class_of_kvpatch_is_said(wide: Wide, name: str) -> None:
    error = _refused(wide(name, None), kv_heads=2, target="kvpatch")
    assert error.message.startswith(f"--target kvpatch: there is no such class for a {name} model")
    assert error.hint == "Choose --target native."
    error = _refused(wide(name, None), method="cla", share=2)
    assert error.message == (
        f"no model class holds a {name} model with layers that share keys and values"
    )
    assert error.hint is not None
    assert "--kv-heads" in error.hint


@pytest.mark.parametrize("name", [name for name in _MULTI_HEAD if "clip" in name])
def test_clipping_refuses_the_svd_merge(wide: Wide, name: str) -> None:
    error = _refused(wide(name, None), kv_heads=2, merge="svd")
    assert "clip_qkv 0.7" in error.message
    assert error.hint == "Choose --merge mean or first."


def test_a_conversion_is_not_converted_again(wide: Wide, tmp_path: Path) -> None:
    source = _convert(wide("gpt2", None), tmp_path / "once", kv_heads=2)
    error = _refused(source, kv_heads=1)
    assert error.message == "this kvpatch_gpt2 model is a conversion already"
    assert error.hint == "Convert the model that it was made from."


@pytest.mark.parametrize("name", ["gpt2", "falcon", "llama"])
def test_there_is_nothing_less_than_one_head(wide: Wide, tmp_path: Path, name: str) -> None:
    source = _convert(wide(name, None), tmp_path / "single", kv_heads=1)
    error = _refused(source, kv_heads=1)
    assert "has a single KV head (MQA) already" in error.message


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon"])
def test_heads_with_a_slope_of_their_own_stay_in_their_places(wide: Wide, name: str) -> None:
    error = _refused(wide(name, None), kv_heads=2, merge="svd", group="similar")
    assert f"--group similar does not work for {name}" in error.message
    assert "ALiBi" in error.message
    assert error.hint == "Choose --group adjacent."
