"""Which targets there are for which model, and what the two kinds that keep names write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convert.checkpoint.reader import read_json
from convert.targets import Rewrite, targets_for
from convert.targets.native import with_dtype
from kvpatch.errors import UsageError
from tests.families.stock import Checkpoints, change_kv_heads, full_logits, load, random_ids
from tests.families.tiny import GROUPED, MODELS, family
from tests.helpers import assert_close
from tests.targets.applying import facts_of, write
from tests.targets.classes import EXPERTS, PATCHED, stock_class


@pytest.fixture
def source(checkpoint: Checkpoints, name: str) -> Path:
    return checkpoint(name)


@pytest.mark.parametrize("name", MODELS)
def test_classes_of_transformers_stand_before_those_of_kvpatch(source: Path, name: str) -> None:
    facts, _ = facts_of(source)
    own = [] if family(name) in EXPERTS else [("kvpatch", f"kvpatch_{family(name)}")]
    for kv_heads in (1, 2):
        model_type = stock_class(name, kv_heads)
        native = [] if model_type is None else [("native", model_type)]
        found = [(t.name, t.model_type) for t in targets_for(facts, kv_heads=kv_heads)]
        assert found == native + own
    unchanged = targets_for(facts, kv_heads=facts.geometry.kv_heads)
    assert (unchanged[0].name, unchanged[0].model_type) == ("native", family(name))


@pytest.mark.parametrize("name", PATCHED)
def test_layers_that_share_need_our_class(source: Path, name: str) -> None:
    facts, _ = facts_of(source)
    sources = [0, *range(facts.layers - 1)]
    (target,) = targets_for(facts, kv_heads=2, kv_source_layers=sources)
    assert target.edit({})["kv_source_layers"] == sources
    alone = targets_for(facts, kv_heads=2, kv_source_layers=list(range(facts.layers)))
    assert [t.model_type for t in alone] == [t.model_type for t in targets_for(facts, kv_heads=2)]
    assert all("kv_source_layers" not in target.edit({}) for target in alone)


@pytest.mark.parametrize("name", [name for name in MODELS if family(name) in EXPERTS])
def test_what_no_class_holds_is_refused_by_name(source: Path, name: str) -> None:
    facts, _ = facts_of(source)
    with pytest.raises(UsageError, match=f"no model class holds a {family(name)} model with lay"):
        targets_for(facts, kv_heads=2, kv_source_layers=[0, *range(facts.layers - 1)])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", PATCHED)
def test_our_class_computes_the_source_with_merged_heads(
    source: Path, tmp_path: Path, name: str, kv_heads: int
) -> None:
    facts, _ = facts_of(source)
    target = targets_for(facts, kv_heads=kv_heads)[-1]
    assert target.name == "kvpatch"
    actual = load(write(source, tmp_path / "out", target, kv_heads=kv_heads))
    expected = load(source)
    change_kv_heads(expected, kv_heads, lambda heads: heads.mean(0), dtype=torch.float64)
    assert type(actual).__name__ == target.architecture
    ids = random_ids(expected)
    assert_close(full_logits(actual, ids), full_logits(expected, ids), atol=1e-10)


@pytest.mark.parametrize("name", GROUPED)
def test_the_own_class_changes_one_key_and_no_name(source: Path, name: str) -> None:
    facts, _ = facts_of(source)
    target = targets_for(facts, kv_heads=2)[0]
    config = read_json(source / "config.json")
    config.pop("output_router_logits", None)
    added = {"auto_map": {}, "output_router_logits": True}
    assert target.edit(config | added) == config | {"num_key_value_heads": 2}
    assert target.rename("any.name") == Rewrite("any.name")
    assert (target.family, target.reads) == (facts.family, frozenset())


def test_dtype_goes_under_the_key_that_is_there() -> None:
    assert with_dtype({"a": 1}, None) == {"a": 1}
    assert with_dtype({"dtype": "float32"}, "bfloat16") == {"dtype": "bfloat16"}
    assert with_dtype({"torch_dtype": "float32"}, "float16") == {"torch_dtype": "float16"}
    assert with_dtype({}, "float16") == {"dtype": "float16"}
    both = {"torch_dtype": "float32", "dtype": "float32"}
    assert with_dtype(both, "float16") == dict.fromkeys(both, "float16")
