"""Index files that lie: about paths, about files, about tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.builders import assert_refused, run_gqa, write_json, write_model, write_shards

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "model")


def redirect(model: Path, file: object) -> None:
    """Let the index place lm_head in another file."""
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    write_json(model / INDEX, index)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "..\\secret.safetensors",
        "/etc/secret.safetensors",
        "C:\\secret.safetensors",
        "C:secret.safetensors",
        "\\\\server\\share\\secret.safetensors",
        "//server/share/secret.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "\x1b[31m.safetensors",
    ],
)
def test_name_outside_the_checkpoint(model: Path, file: str) -> None:
    (model.parent / "secret.safetensors").write_bytes((model / "a.safetensors").read_bytes())
    redirect(model, file)
    assert_refused(model, repr(file), "outside")


def test_absolute_name_of_a_file_that_is_there(model: Path) -> None:
    redirect(model, str(model / "a.safetensors"))
    assert_refused(model, "outside")


@pytest.mark.parametrize("file", ["b.safetensors", "config.json", INDEX])
def test_link_that_leaves_the_checkpoint(model: Path, file: str) -> None:
    outside = model.parent / f"outside-{file}"
    (model / file).rename(outside)
    (model / file).symlink_to(outside)
    assert_refused(model, f"{file} is a link that leaves the checkpoint", str(outside))


def test_folder_that_is_a_link_out_of_the_checkpoint(model: Path) -> None:
    outside = model.parent / "outside"
    outside.mkdir()
    (model / "a.safetensors").rename(outside / "a.safetensors")
    (model / "sub").symlink_to(outside)
    redirect(model, "sub/a.safetensors")
    assert_refused(model, "sub/a.safetensors is a link that leaves the checkpoint")


def test_link_inside_the_checkpoint_is_followed(model: Path) -> None:
    (model / "b.safetensors").rename(model / "real.safetensors")
    (model / "b.safetensors").symlink_to("real.safetensors")
    assert run_gqa(model, model.parent / "out").code == 0


def test_link_to_itself(model: Path) -> None:
    (model / "b.safetensors").unlink()
    (model / "b.safetensors").symlink_to("b.safetensors")
    assert_refused(model, "b.safetensors")


@pytest.mark.parametrize("name", ["x" * 300, "\ud800"], ids=["too_long", "no_unicode"])
def test_name_that_no_file_can_have(model: Path, name: str) -> None:
    redirect(model, f"{name}.safetensors")
    assert_refused(model, ".safetensors")


@pytest.mark.parametrize("file", [7, None, ["a.safetensors"], {"file": "a.safetensors"}, ""])
def test_value_is_no_file_name(model: Path, file: object) -> None:
    redirect(model, file)
    assert_refused(model, INDEX, "'lm_head.weight'", repr(file))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "a.safetensors.exe", "config.json"])
def test_wrong_extension(model: Path, file: str) -> None:
    redirect(model, file)
    assert_refused(model, INDEX, "'lm_head.weight'", repr(file), ".safetensors file")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("[]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ("null", "not a JSON object"),
        ("", "not valid JSON"),
        ('{"weight_map": {', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "weight_map is absent or empty"),
        ('{"weight_map": {}}', "weight_map is absent or empty"),
        ('{"weight_map": ["a"]}', "weight_map is absent or empty"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands there twice"),
    ],
    ids=[
        "list",
        "text",
        "null",
        "empty",
        "cut",
        "deep",
        "no_map",
        "empty_map",
        "map_is_list",
        "twice",
    ],
)
def test_index_is_malformed(model: Path, text: str, fact: str) -> None:
    (model / INDEX).write_text(text)
    assert_refused(model, INDEX, fact)


def test_huge_index_is_not_read(model: Path) -> None:
    with (model / INDEX).open("r+b") as stream:
        stream.truncate(100_000_001)  # a sparse file: takes no disk
    assert_refused(model, INDEX, "100,000,001 bytes", "more than 100,000,000")


def test_file_is_missing(model: Path) -> None:
    (model / "b.safetensors").unlink()
    assert_refused(model, "b.safetensors is missing", "Download")


def test_tensor_is_not_in_its_shard(model: Path) -> None:
    redirect(model, "b.safetensors")
    assert_refused(model, "1 tensors that their shards do not hold", "'lm_head.weight'")


def test_tensor_outside_the_index_is_read_as_by_transformers(tmp_path: Path) -> None:
    model = write_shards(tmp_path / "model", extra={"stray": torch.ones(3)})
    run = run_gqa(model, tmp_path / "out")
    assert run.code == 0
    assert "does not read 'stray': left out" in run.err
    assert "stray" not in load_file(tmp_path / "out" / "model.safetensors")


def test_tensor_of_two_shards_is_refused(tmp_path: Path) -> None:
    model = write_shards(tmp_path / "model", extra={"lm_head.weight": torch.zeros(16, 8)})
    assert_refused(model, "a.safetensors and b.safetensors both hold 'lm_head.weight'")


def test_both_a_single_file_and_an_index(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "a.safetensors").read_bytes())
    assert_refused(model, "both model.safetensors and", INDEX, "stale")


def test_index_of_the_single_file_alone_is_no_contradiction(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    names = load_file(model / "model.safetensors")
    write_json(model / INDEX, {"weight_map": dict.fromkeys(names, "model.safetensors")})
    assert run_gqa(model, tmp_path / "out").code == 0


@pytest.mark.parametrize("file", ["model.safetensors", INDEX])
def test_no_weights(tmp_path: Path, file: str) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / file).symlink_to("nowhere")  # what an interrupted download leaves
    assert_refused(model, "no weights", "Download")
