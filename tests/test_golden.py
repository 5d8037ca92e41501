"""Bytes of whole conversions: the same today as yesterday, and twice the same.

The checkpoint is made by integer arithmetic and every sum in the conversion is exact, so the
bytes do not depend on a random generator, the machine, or the number of threads. A change of the
hashes is a change of what users get: state it in CHANGELOG.md, and put the new hashes here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.faults.builders import frame, llama_tensors, write_model
from tests.faults.running import cli, contents

COMMANDS = {
    "gqa_mean": ["gqa", "--kv-heads", "2"],
    "gqa_first": ["gqa", "--kv-heads", "2", "--merge", "first"],
    "mqa": ["mqa"],
    "gqa_shards": ["gqa", "--kv-heads", "2", "--max-shard-size", "2KB", "--dtype", "bfloat16"],
}
# what linear algebra computes may differ in the last bit between processors: no record of it
REPEATED = {
    **COMMANDS,
    "gqa_svd": ["gqa", "--kv-heads", "2", "--merge", "svd", "--group", "similar"],
}
GOLDEN = {
    "gqa_mean": {
        "README.md": "ab85f106c21b13656c8920f21d46092d",
        "config.json": "ba00cdc55ee0f21cf3e1e65e9ebc49ca",
        "kvpatch.json": "75dd198bba0b948cc7feeeac67e8bdf4",
        "model.safetensors": "7944ff970442737cfd9c26f56d64ee88",
        "tokenizer.json": "e0e77b70ca77d0be8f321590c0deb449",
    },
    "gqa_first": {
        "README.md": "670dc843236f98e57eea377c0a5c366d",
        "config.json": "ba00cdc55ee0f21cf3e1e65e9ebc49ca",
        "kvpatch.json": "aebf243229a1d7052f27f0602dcb3ffa",
        "model.safetensors": "485d108cb07b34ee5042533ca8f397d4",
        "tokenizer.json": "e0e77b70ca77d0be8f321590c0deb449",
    },
    "mqa": {
        "README.md": "910231c0b3af431ebbb256eb61391f02",
        "config.json": "b8d2065a563f42bb91870abc60b49a8e",
        "kvpatch.json": "ef327bda10248dc798d777cb96f78f51",
        "model.safetensors": "9e4ba72190185c2116d54d8125c40d63",
        "tokenizer.json": "e0e77b70ca77d0be8f321590c0deb449",
    },
    "gqa_shards": {
        "README.md": "61735c94b337025c3a619688d74b463b",
        "config.json": "03a3ae50ab3623d92cdd20d9cf85bd18",
        "kvpatch.json": "8b0e61c64e9c880e1a73541c3841ef0e",
        "model-00001-of-00002.safetensors": "bf74cf5e72b73ffa64ac05d06d8da70a",
        "model-00002-of-00002.safetensors": "bebcdef0d4fa7bda237ec86c5f39d3fa",
        "model.safetensors.index.json": "345e1617ad6418afa0933646ee6def8c",
        "tokenizer.json": "e0e77b70ca77d0be8f321590c0deb449",
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("golden") / "tiny")
    # written by hand: another version of safetensors may order or pad the header otherwise
    header: dict[str, object] = {}
    data = b""
    for name, tensor in llama_tensors().items():
        start, data = len(data), data + tensor.numpy().tobytes()
        offsets = [start, len(data)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    (folder / "model.safetensors").write_bytes(frame(header, data))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# Tiny\n")
    return folder


def run(command: str, source: Path, out: Path) -> dict[str, bytes]:
    name, *flags = REPEATED[command]
    result = cli([name, str(source), str(out), *flags])
    assert result.code == 0, result.err
    files = contents(out)
    return {file: content for file, content in files.items() if isinstance(content, bytes)}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """The first half of each file's sha256; the manifest without the versions of the tools."""
    manifest = json.loads(files["kvpatch.json"])
    assert set(manifest.pop("versions")) == {"kvpatch", "python", "torch", "safetensors", "numpy"}
    stable = {**files, "kvpatch.json": json.dumps(manifest, sort_keys=True).encode()}
    return {name: hashlib.sha256(content).hexdigest()[:32] for name, content in stable.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_bytes_are_those_of_the_record(command: str, source: Path, tmp_path: Path) -> None:
    found = digests(run(command, source, tmp_path / "out"))
    assert found == GOLDEN[command], f"now:\n{json.dumps(found, indent=4)}"


@pytest.mark.parametrize("command", REPEATED)
def test_two_runs_write_the_same_bytes(command: str, source: Path, tmp_path: Path) -> None:
    first = run(command, source, tmp_path / "first")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second = run(command, source, tmp_path / "elsewhere" / "second")
    finally:
        torch.set_num_threads(threads)
    assert first == second


@pytest.mark.parametrize("command", COMMANDS)
def test_manifest_hashes_the_other_files(command: str, source: Path, tmp_path: Path) -> None:
    files = run(command, source, tmp_path / "out")
    manifest = json.loads(files.pop("kvpatch.json"))
    assert manifest["files"] == {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for name, content in files.items()
    }
