"""Damaged weight files and damaged numbers: what is wrong is named, and nothing is published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.faults.builders import (
    assert_refused,
    attention,
    frame,
    header_of,
    replace_header,
    run_gqa,
    write_model,
    write_shards,
)
from tests.helpers import assert_equal

WEIGHTS = "model.safetensors"
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.mark.parametrize("missing", [1, 500])
def test_truncated_data(model: Path, missing: int) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:-missing])
    sizes = f"{len(content) - missing:,} bytes, expected {len(content):,}"
    assert_refused(model, WEIGHTS, "truncated", sizes, "Download")


def test_truncated_inside_the_header(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:100])
    assert_refused(model, WEIGHTS, "truncated", "a file of 100", "Download")


@pytest.mark.parametrize("size", [0, 7])
def test_too_short_for_a_header(model: Path, size: int) -> None:
    (model / WEIGHTS).write_bytes(bytes(size))
    assert_refused(model, WEIGHTS, f"empty or truncated: {size} bytes", "Download")


def test_trailing_bytes(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content + b"PK\x03\x04")
    sizes = f"{len(content) + 4:,} bytes, expected {len(content):,}"
    assert_refused(model, WEIGHTS, "longer than its header says", sizes)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9000000\n",
            ("Git LFS pointer", "git lfs pull"),
        ),
        (b"<!DOCTYPE html>\n<html><body>Please log in</body></html>", ("an HTML page", "download")),
        (b"<html><head><title>404</title></head></html>", ("an HTML page", "download")),
        (b'{"error": "Repository not found"}', ("not safetensors", "Download")),
    ],
    ids=["lfs_pointer", "html_doctype", "html", "json"],
)
def test_something_else_instead_of_weights(
    model: Path, content: bytes, facts: tuple[str, ...]
) -> None:
    (model / WEIGHTS).write_bytes(content)
    assert_refused(model, WEIGHTS, *facts)


def test_damage_of_one_shard_is_told_by_its_name(tmp_path: Path) -> None:
    model = write_shards(tmp_path / "model")
    (model / "b.safetensors").write_bytes((model / "b.safetensors").read_bytes()[:-1])
    message = assert_refused(model, "b.safetensors is truncated")
    assert "a.safetensors" not in message


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b"[]",
        b"",
        b'{"a": {"dtype": "F32"',
        b"\xff\xfe{}",
        b'{"a":' + b"[" * 5000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=["text", "list", "nothing", "cut", "not_utf8", "deep", "huge_number"],
)
def test_header_is_no_json_object(model: Path, text: bytes) -> None:
    (model / WEIGHTS).write_bytes(frame(text))
    assert_refused(model, WEIGHTS, "JSON")


@pytest.mark.parametrize(
    ("entry", "fact"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": 1}, "malformed"),
        ({"dtype": "F32", "shape": [2]}, "malformed"),
        ([], "malformed"),
        ({"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}, "dtype 'F31'"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "dtype ['F32']"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "integers >= 0"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "integers >= 0"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "integers >= 0"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "integers >= 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "integers >= 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "-8 bytes of data"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "4 bytes of data for F32 [2]"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}, str(2**40)),
        ({"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}, str(2**70)),
        ({"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}, str(2**40)),
    ],
    ids=[
        "unknown_field",
        "no_offsets",
        "no_object",
        "dtype_unknown",
        "dtype_no_text",
        "shape_negative",
        "shape_float",
        "shape_bool",
        "shape_no_list",
        "one_offset",
        "offsets_reversed",
        "offsets_short",
        "shape_overflows",
        "empty_shape_too_wide",
        "empty_shape_overflows",
    ],
)
def test_header_entry(model: Path, entry: object, fact: str) -> None:
    replace_header(model / WEIGHTS, {"extra.weight": entry})
    assert_refused(model, WEIGHTS, "'extra.weight'", fact)


@pytest.mark.parametrize("shift", [-4, 4], ids=["overlap", "hole"])
def test_tensors_overlap_or_leave_a_hole(model: Path, shift: int) -> None:
    header, data = header_of((model / WEIGHTS).read_bytes())
    end = len(data)
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [end + shift, end + shift + 8]}
    (model / WEIGHTS).write_bytes(frame({**header, "zz": entry}, data + bytes(8 + shift)))
    assert_refused(model, WEIGHTS, "'zz' starts at byte", "expected")


def test_name_twice_in_the_header(model: Path) -> None:
    header, data = header_of((model / WEIGHTS).read_bytes())
    text = json.dumps(header)[:-1] + f', "lm_head.weight": {json.dumps(header["lm_head.weight"])}}}'
    (model / WEIGHTS).write_bytes(frame(text.encode(), data))
    assert_refused(model, WEIGHTS, "'lm_head.weight' stands there twice")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001], ids=str)
def test_header_length_beyond_the_file_allocates_nothing(model: Path, length: int) -> None:
    (model / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{}")
    assert_refused(model, WEIGHTS, f"header of {length:,} bytes in a file of 10")


def test_no_tensors(model: Path) -> None:
    (model / WEIGHTS).write_bytes(frame({}))
    assert_refused(model, "holds no tensors")


def test_flipped_bit_is_found_by_the_hash_of_the_hub(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain")
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "config.json").write_bytes((plain / "config.json").read_bytes())
    content = bytearray((plain / WEIGHTS).read_bytes())
    sha256 = hashlib.sha256(content).hexdigest()
    content[-1] ^= 1
    (blobs / sha256).write_bytes(content)
    (snapshot / WEIGHTS).symlink_to(f"../../blobs/{sha256}")
    found = hashlib.sha256(content).hexdigest()
    assert_refused(snapshot, f"{WEIGHTS} is damaged", found, sha256, "Delete")


def _spoiled(name: str, bad: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensor = torch.ones(12 if "mlp" in name else 8, 8, dtype=dtype)
    tensor[3, 5] = tensor[6, 0] = bad
    return {name: tensor}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", [attention(1, "q"), "model.layers.0.mlp.up_proj.weight"])
def test_nonfinite_weight_is_refused(tmp_path: Path, name: str, bad: float) -> None:
    model = write_model(tmp_path / "model", _spoiled(name, bad))
    assert_refused(
        model, f"'{name}' holds 2 values", "first at [3, 5]", WEIGHTS, "--allow-nonfinite"
    )


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nonfinite_key_or_value_is_never_pooled(
    tmp_path: Path, part: str, dtype: torch.dtype
) -> None:
    name = attention(1, part)
    model = write_model(tmp_path / "model", _spoiled(name, float("nan"), dtype))
    flags = ["--allow-nonfinite"]
    assert_refused(model, f"'{name}' holds 2 values", "first at [3, 5]", flags=flags)


def test_nonfinite_value_late_in_a_large_tensor(tmp_path: Path) -> None:
    rows = (5 << 20) // 8  # 20 MiB: three chunks of the copy
    late = torch.zeros(rows, 8)
    late[-1, 6] = float("inf")
    tables = {"model.embed_tokens.weight": late, "lm_head.weight": torch.zeros(rows, 8)}
    model = write_model(tmp_path / "model", tables, vocab_size=rows)
    assert_refused(model, "'model.embed_tokens.weight' holds 1 values", f"first at [{rows - 1}, 6]")


def test_allow_nonfinite_copies_untouched_tensors(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    spoiled = _spoiled(name, float("nan"))
    model = write_model(tmp_path / "model", spoiled)
    assert run_gqa(model, tmp_path / "out", "--allow-nonfinite").code == 0
    copied = load_file(tmp_path / "out" / WEIGHTS)[name]
    assert_equal(copied.view(torch.int32), spoiled[name].view(torch.int32))


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (lambda: torch.zeros(8, 8), 0.0),
        (lambda: torch.full((8, 8), 0.375), 0.0),
        (lambda: torch.tensor([1.0, 1, -1, -1]).repeat(2)[:, None].expand(8, 8).contiguous(), 1.0),
    ],
    ids=["zero", "constant", "cancelling"],
)
def test_degenerate_keys_have_a_defined_result(
    tmp_path: Path, make: Callable[[], Tensor], lost: float
) -> None:
    keys = make()
    model = write_model(tmp_path / "model", {attention(0, "k"): keys})
    assert run_gqa(model, tmp_path / "out").code == 0
    written = load_file(tmp_path / "out" / WEIGHTS)[attention(0, "k")]
    assert_equal(written, keys.reshape(2, 2, 2, 8).mean(1).reshape(4, 8))
    manifest = json.loads((tmp_path / "out" / "kvpatch.json").read_text())
    assert manifest["layers"][0]["lost_energy_k"] == lost


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nerror: forged", "a\\nerror: forged"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("[bold]rich[/nope]", "[bold]rich[/nope]"),
        ("../../etc/passwd", "../../etc/passwd"),
    ],
    ids=["control", "newline", "bidi", "markup", "path"],
)
def test_hostile_tensor_name_is_shown_harmless(tmp_path: Path, name: str, shown: str) -> None:
    model = write_model(tmp_path / "model", {name: torch.ones(1)})
    for arguments in (["--dry-run"], []):
        run = run_gqa(model, tmp_path / "out", *arguments)
        assert run.code == 0, run.err
        assert f"does not read '{shown}': left out" in run.err
        assert not set(run.err + run.out) & set("\x1b\x07\u202e")
        assert "\nerror" not in run.err
    assert name not in load_file(tmp_path / "out" / WEIGHTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_long_tensor_name_does_not_flood_the_terminal(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"n" * 10_000: torch.ones(1)})
    run = run_gqa(model, tmp_path / "out", "--dry-run")
    assert run.code == 0
    assert "does not read 'nnnn" in run.err
    assert len(run.err + run.out) < 8000


def test_newline_in_a_name_forges_no_line_of_the_table(tmp_path: Path) -> None:
    name = "model.layers.2.x\nerror: forged"
    model = write_model(tmp_path / "model", {name: torch.ones(1)})
    assert "\nerror: forged" not in assert_refused(model, "no layer 2", "forged", lines=3)


def test_name_that_is_no_unicode_is_refused(model: Path) -> None:
    replace_header(model / WEIGHTS, {"\ud800": EMPTY})
    assert_refused(model, WEIGHTS, "not valid JSON")
