"""Layers that share keys and values, through the whole pipeline, on every family with a class.

Checkpoints are in float64 and stay so. The truth is the stock class with its own weights changed in
place, and with a cache that hands a layer's keys and values to the layers that read them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from typer.testing import CliRunner

from convert import convert, make_recipe
from convert.cli import app
from convert.verify import cache_bytes, verify_checkpoint
from kvpatch.errors import UsageError
from kvpatch.models import source_files
from tests.families.stock import (
    Float64,
    attentions,
    change_kv_heads,
    full_logits,
    kv_fields,
    load,
    make,
    random_ids,
)
from tests.families.tiny import settings
from tests.helpers import assert_close
from tests.kvpatch.stacks import ReadingCache
from tests.targets.classes import PATCHED

_LAYERS = 4
_KINDS = ["sliding_attention"] * 2 + ["full_attention"] * 2
# families whose layers differ, with two neighbours of each kind
_IN_PAIRS: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {"layer_types": _KINDS}
        for name in PATCHED
        if name.partition(":")[0] in {"gemma2", "gemma3_text", "olmo3"}
    },
    "qwen2:window-tied": {"max_window_layers": 2},
    "qwen3:bias-window": {"max_window_layers": 2},
    "smollm3": {"no_rope_layers": [1, 1, 0, 0]},
    "smollm3:bias-window-untied": {"no_rope_layers": [1, 1, 0, 0]},
    "gpt_neo": {"attention_types": [[["global"], 2], [["local"], 2]]},
}
_PAIRS = [0, 0, 2, 2]
# every model with as many heads as before, and of every family one with fewer besides
_CASES: list[tuple[str, int | None]] = [
    *((name, None) for name in PATCHED),
    *((name, 2) for name in PATCHED if ":" not in name),
]


def _settings(name: str, layers: int = _LAYERS) -> dict[str, Any]:
    return settings(name) | {"num_hidden_layers": layers, **_IN_PAIRS.get(name, {})}


def _model(name: str, layers: int = _LAYERS) -> Any:
    return make(name, _settings(name, layers), seed=3)


def _save(model: Any, folder: Path) -> Path:
    model.double().save_pretrained(folder)
    return folder


def _convert(source: Path, out: Path, **keys: object) -> Path:
    recipe = {"method": "cla", "share": 2, "source": str(source), "output": str(out), **keys}
    return convert(make_recipe(recipe))


@torch.no_grad()
def _reading(model: Any, sources: Sequence[int], ids: Tensor) -> Tensor:
    """Logits of a stock model whose layers read the keys and values of ``sources``."""
    with Float64():
        held = ReadingCache(sources, model.config)
        logits: Tensor = model(ids, past_key_values=held, use_cache=True).logits
    return logits


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "kvpatch.json").read_text())
    return manifest


def _heads(model: Any) -> int:
    heads: int = model.config.num_attention_heads
    return heads


def _kv_weights(attention: Any, heads: int) -> Iterator[Tensor]:
    """All weights that belong to keys and values, as views; those of norms perhaps twice."""
    for fields in kv_fields(attention, heads):
        yield from fields
    for name in ("k_norm", "k_layernorm"):
        if hasattr(attention, name):
            yield from getattr(attention, name).parameters()


@torch.no_grad()
def _average(model: Any, units: Sequence[Sequence[int]]) -> None:
    """Give all layers of a unit the mean of their keys and values, in place."""
    modules = attentions(model)
    for unit in units:
        weights = [list(_kv_weights(modules[layer], _heads(model))) for layer in unit]
        for same in zip(*weights, strict=True):
            mean = torch.stack(same).mean(0)
            for weight in same:
                weight.copy_(mean)


@pytest.mark.parametrize(("name", "kv_heads"), _CASES)
def test_readers_of_the_first_read_what_it_makes(
    tmp_path: Path, name: str, kv_heads: int | None
) -> None:
    source = _save(_model(name), tmp_path / "source")
    out = _convert(source, tmp_path / "out", merge="first", kv_heads=kv_heads)
    expected, actual = load(source), load(out)
    ids = random_ids(expected)
    if kv_heads is not None:
        change_kv_heads(expected, kv_heads, lambda heads: heads[0], dtype=torch.float64)
    alone = full_logits(expected, ids)
    wanted = _reading(expected, _PAIRS, ids)
    assert float((wanted - alone).abs().max()) > 1e-3, "sharing changed nothing"
    assert_close(full_logits(actual, ids), wanted, atol=1e-9)


@pytest.mark.parametrize(("name", "kv_heads"), _CASES)
def test_layers_of_a_unit_read_the_mean_of_their_projections(
    tmp_path: Path, name: str, kv_heads: int | None
) -> None:
    source = _save(_model(name), tmp_path / "source")
    out = _convert(source, tmp_path / "out", merge="mean", kv_heads=kv_heads)
    expected, actual = load(source), load(out)
    ids = random_ids(expected)
    apart = _reading(expected, _PAIRS, ids)
    _average(expected, [(0, 1), (2, 3)])
    if kv_heads is not None:
        change_kv_heads(expected, kv_heads, lambda heads: heads.mean(0), dtype=torch.float64)
    wanted = _reading(expected, _PAIRS, ids)
    assert float((wanted - apart).abs().max()) > 1e-3, "the mean is the first"
    assert_close(full_logits(actual, ids), wanted, atol=1e-9)


@torch.no_grad()
def _with_copies(name: str, kv_heads: int, order: Sequence[int]) -> Any:
    """A model whose layers 1 and 3 see what 0 and 2 see, and whose keys and values are theirs.

    The latter add nothing to the residual stream. KV head h of a layer is head ``order[h]`` of the
    one before it; queries and outputs are different everywhere.
    """
    model = _model(name)
    change_kv_heads(model, kv_heads, lambda heads: heads[0], dtype=torch.float32)
    modules, names = attentions(model), {m: n for n, m in model.named_modules()}
    for producer, reader in ((0, 1), (2, 3)):
        one, other = (
            model.get_submodule(_layer_name(names[modules[i]], i)) for i in (producer, reader)
        )
        for key, module in one.named_modules():
            if key.rpartition(".")[2] in _OUTPUTS:
                for weight in module.parameters():
                    weight.zero_()
        norms = {k: w for k, w in one.state_dict().items() if "norm" in k or "ln" in k}
        other.load_state_dict(norms, strict=False)
        fields = zip(
            *(kv_fields(modules[i], _heads(model)) for i in (producer, reader)), strict=True
        )
        for made, read in fields:
            for head, weight in enumerate(read):
                weight.copy_(made[order[head]])
    return model


# last names of the modules by which a layer adds to the residual stream
_OUTPUTS = {
    *("o_proj", "dense", "out_proj", "c_proj"),
    *("down_proj", "dense_4h_to_h", "fc2", "fc_out"),
}


def _layer_name(attention: str, layer: int) -> str:
    """The name of a decoder layer from that of a module in it."""
    before, _, _ = attention.partition(f".{layer}.")
    return f"{before}.{layer}"


def _stay(name: str) -> bool:
    """Whether heads cannot be matched: keys have a norm, or queries an offset by their place."""
    model = _model(name)
    norms = ("k_norm", "k_layernorm")
    alibi = model.config.model_type in {"bloom", "mpt", "falcon"}
    return alibi or any(hasattr(attentions(model)[0], norm) for norm in norms)


@pytest.mark.parametrize(("name", "kv_heads"), [case for case in _CASES if "clip" not in case[0]])
def test_copies_in_layers_that_see_the_same_merge_without_loss(
    tmp_path: Path, name: str, kv_heads: int | None
) -> None:
    heads = _heads(_model(name))
    order = range(heads) if _stay(name) else [*range(2, heads), 1, 0]
    source = _save(_with_copies(name, kv_heads or heads, order), tmp_path / "source")
    out = _convert(source, tmp_path / "out", merge="svd", kv_heads=kv_heads)
    expected, actual = load(source), load(out)
    assert actual.config.kv_source_layers == _PAIRS
    ids = random_ids(expected)
    assert_close(full_logits(actual, ids), full_logits(expected, ids), atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "phi", "cohere"])
def test_unmatched_heads_are_merged_in_their_places(tmp_path: Path, name: str) -> None:
    source = _save(_with_copies(name, 4, [2, 3, 1, 0]), tmp_path / "moved")
    expected = load(source)
    moved = load(_convert(source, tmp_path / "out", merge="svd", match=False))
    ids = random_ids(expected)
    lost = (full_logits(moved, ids) - full_logits(expected, ids)).abs().max()
    assert float(lost) > 1e-3
    source = _save(_with_copies(name, 4, range(4)), tmp_path / "in-place")
    expected = load(source)
    kept = load(_convert(source, tmp_path / "kept", merge="svd", match=False))
    assert_close(full_logits(kept, ids), full_logits(expected, ids), atol=1e-9)


@pytest.mark.parametrize(
    ("layers", "keys", "sources"),
    [
        (5, {}, [0, 1, 1, 3, 3]),
        (4, {"share": 3}, [0, 1, 1, 1]),
        (4, {"share": 4}, [0, 0, 0, 0]),
        (4, {"share": 9}, [0, 0, 0, 0]),
        (4, {"layers": "1:3"}, [0, 1, 1, 3]),
        (5, {"layers": "2:"}, [0, 1, 2, 3, 3]),
        (5, {"layers": ":3", "share": 3}, [0, 0, 0, 3, 4]),
    ],
)
def test_uneven_layers_and_ranges(
    tmp_path: Path, layers: int, keys: Mapping[str, object], sources: list[int]
) -> None:
    source = _save(_model("llama", layers), tmp_path / "source")
    out = _convert(source, tmp_path / "out", merge="first", **keys)
    assert json.loads((out / "config.json").read_text())["kv_source_layers"] == sources
    assert _manifest(out)["kv_cache"]["kv_source_layers"] == sources
    expected, actual = load(source), load(out)
    ids = random_ids(expected)
    assert_close(full_logits(actual, ids), _reading(expected, sources, ids), atol=1e-9)


def test_auto_shares_where_nothing_is_lost(tmp_path: Path) -> None:
    """Layers 1 to 3 have the same keys and values, the others have others."""
    model = _model("llama", 6)
    modules = attentions(model)
    for reader in (2, 3):
        for weight, wanted in zip(
            _kv_weights(modules[reader], 4), _kv_weights(modules[1], 4), strict=True
        ):
            weight.data.copy_(wanted)
    source = _save(model, tmp_path / "source")
    for merge in ("mean", "svd"):
        out = _convert(source, tmp_path / merge, merge=merge, layers="auto")
        found = _manifest(out)["kv_cache"]["kv_source_layers"]
        assert found[1:4] == [1, 1, 1], found
        assert len(set(found)) == 3


@pytest.mark.parametrize("name", [name for name in PATCHED if ":" not in name])
def test_readers_hold_nothing_in_the_cache(tmp_path: Path, name: str) -> None:
    source = _save(_model(name), tmp_path / "source")
    out = _convert(source, tmp_path / "out", kv_heads=2)
    model, before = load(out), load(source).config
    ids = random_ids(model, 12)
    stepwise = _stepwise(model, ids, DynamicCache(config=model.config))
    assert_close(stepwise, full_logits(model, ids), atol=1e-10)
    held, tokens = DynamicCache(config=model.config), 3  # as many as the smallest window holds
    _stepwise(model, ids[:, :tokens], held)
    width = getattr(before, "head_dim", None) or before.hidden_size // before.num_attention_heads
    token = 2 * 2 * width * 8 * len(set(_PAIRS))  # key and value of two heads, in float64
    assert cache_bytes(held) == 2 * tokens * token
    assert _manifest(out)["kv_cache"]["bytes_per_token"][1] == token


@torch.no_grad()
def _stepwise(model: Any, ids: Tensor, held: Any) -> Tensor:
    with Float64():
        steps = [
            model(token, past_key_values=held, use_cache=True).logits
            for token in ids.split(1, dim=1)
        ]
    return torch.cat(steps, 1)


_WITHOUT_KVPATCH = """
import sys
sys.modules["kvpatch"] = None
import torch
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", output_loading_info=True
)
assert not any(report.values()), report
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, out)
"""


def test_the_folder_brings_its_own_model_code(tmp_path: Path) -> None:
    source = make("llama", _settings("llama"), seed=3)
    source.save_pretrained(tmp_path / "source")
    out = _convert(tmp_path / "source", tmp_path / "out", merge="svd", kv_heads=2)
    for file in source_files():
        assert (out / file.name).read_bytes() == file.read_bytes()
    checks = {c.name: c.status for c in verify_checkpoint(out, tmp_path / "source")}
    assert checks.pop("tokens") == "skipped"  # a tiny model has no tokenizer
    assert set(checks.values()) == {"ok"}, checks
    model = load(out)
    ids = random_ids(model)
    torch.save(ids, tmp_path / "ids")
    arguments = [str(path) for path in (out, tmp_path / "ids", tmp_path / "logits")]
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_KVPATCH, *arguments],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "logits").double()
    # float32 against float64 sums
    assert_close(found, full_logits(model, ids), atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo3", "smollm3", "gpt_neo"])
def test_neighbours_of_two_kinds_are_refused(tmp_path: Path, name: str) -> None:
    source = _save(make(name, settings(name)), tmp_path / "source")
    with pytest.raises(UsageError, match="cannot share keys and values") as caught:
        _convert(source, tmp_path / "out")
    assert caught.value.hint is not None
    assert "--layers auto" in caught.value.hint


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": "3:1"}, "--layers 3:1 is no range of the 4 layers"),
        ({"layers": "0:5"}, "--layers 0:5 is no range of the 4 layers"),
        ({"layers": "half"}, "--layers half is no range"),
        ({"layers": "1-3"}, "--layers 1-3 is no range"),
        ({"layers": ""}, "--layers  is no range"),
        ({"kv_heads": 3}, "--kv-heads 3 does not work"),
        ({"kv_heads": 8}, "--kv-heads 8 does not work"),
        ({"share": 1}, "share: Input should be greater than or equal to 2"),
        ({"target": "native"}, "unknown key 'target'"),
        ({"refit": "o"}, "refit o needs a calibration text"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, keys: Mapping[str, object], message: str
) -> None:
    source = _save(_model("llama"), tmp_path / "source")
    with pytest.raises(UsageError) as caught:
        _convert(source, tmp_path / "out", **keys)
    assert message in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], "0, 1-2, 3-4"),
        (["--layers", "1:4"], "0, 1, 2-3, 4"),
        (["--layers", ":4"], "0-1, 2-3, 4"),
    ],
)
def test_the_plan_shows_who_shares(tmp_path: Path, flags: list[str], shown: str) -> None:
    make("llama", {**settings("llama"), "num_hidden_layers": 5}).save_pretrained(tmp_path / "model")
    arguments = ["cla", str(tmp_path / "model"), str(tmp_path / "out"), "--share", "2", *flags]
    result = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert f"layers that share: {shown}\n" in result.stdout
