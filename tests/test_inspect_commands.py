"""The commands that ``kvpatch inspect`` names work, and give the cache that it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from convert.checkpoint.manifest import read_manifest
from tests.families.stock import make
from tests.families.tiny import family, settings
from tests.faults.running import cli

_FIVE = {"num_hidden_layers": 5}


def _commands(*arguments: str) -> Mapping[str, Any]:
    """Rows of the table by their design."""
    run = cli(["inspect", *arguments, "--json"])
    assert run.code == 0, run.err
    return {row["design"]: row for row in json.loads(run.out)["kv"]}


@pytest.mark.parametrize(
    ("name", "keys"),
    [("llama", {}), ("llama", _FIVE), ("mistral:window", {}), ("gpt_neox", {}), ("bloom", {})],
    ids=["llama", "odd", "window", "gpt_neox", "bloom"],
)
def test_sharing_gives_the_cache_that_is_shown(
    tmp_path: Path, name: str, keys: Mapping[str, Any]
) -> None:
    source = tmp_path / "source"
    make(name, {**settings(name), **keys}).save_pretrained(source)
    rows = _commands(str(source))
    for design, command in {
        "CLA2, 4 KV heads": "kvpatch cla --share 2",
        "CLA2 + MQA": "kvpatch cla --share 2 --kv-heads 1",
    }.items():
        row = rows[design]
        assert row["command"] == command
        _, method, *flags = command.split()
        out = tmp_path / design
        assert cli([method, str(source), str(out), *flags]).code == 0
        cache = read_manifest(out)["kv_cache"]
        assert row["bytes_per_token"] == cache["bytes_per_token"][1]


@pytest.mark.parametrize("name", ["gemma3_text", "mixtral"])
def test_what_cannot_share_is_shown_for_comparison(tmp_path: Path, name: str) -> None:
    """Windows that alternate; experts, for which there is no class."""
    make(family(name), settings(name)).save_pretrained(tmp_path / "source")
    rows = _commands(str(tmp_path / "source"))
    assert rows["CLA2, 4 KV heads"]["command"] is None
    assert rows["CLA2 + MQA"]["command"] is None
    refused = cli(["cla", str(tmp_path / "source"), str(tmp_path / "out"), "--share", "2"])
    assert refused.code == 2


def test_bare_sizes_name_commands_too() -> None:
    rows = _commands("--layers", "32", "--heads", "32", "--head-dim", "128")
    assert {design: row["command"] for design, row in rows.items() if "GQA" not in design} == {
        "MHA, 32 KV heads (now)": None,
        "MQA, 1 KV head": "kvpatch mqa",
        "CLA2, 32 KV heads": "kvpatch cla --share 2",
        "CLA2 + MQA": "kvpatch cla --share 2 --kv-heads 1",
        "MLA, rank 512 + 64 rotary": "kvpatch mla --kv-budget 512+64",
        "MHA, 32 KV heads, window of 4,096 tokens": None,
    }
    single = _commands("--layers", "1", "--heads", "4", "--head-dim", "16")
    assert single["CLA2, 4 KV heads"]["command"] is None
