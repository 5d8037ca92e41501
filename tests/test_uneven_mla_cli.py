"""``kvpatch mla --per-layer`` and ``--share`` as a user meets them: plan, files, card, report."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.scratch import Scratch
from tests.families.texts import random_text
from tests.faults.running import cli, contents, run_child
from tests.mla import SMALL, Source, done, mla, sources

_UNEVEN = ("--kv-budget", "25%", "--per-layer")
_SHARED = (*SMALL, "--share", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sources(tmp_path_factory.mktemp("mla"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(random_text(800, seed=0))
    return file


@pytest.mark.parametrize("flags", [_UNEVEN, _SHARED], ids=["per layer", "share"])
def test_a_plan_says_what_the_result_is(
    source: Source, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    out, shared = tmp_path / "out", "--share" in flags
    run = mla(source("llama"), out, *flags, "--dry-run", "--json")
    assert "no class of transformers holds this: KvpatchLlamaForCausalLM" in run.err
    data = json.loads(run.out)
    assert not contents(tmp_path)
    assert data["class"] == "KvpatchLlamaForCausalLM"
    assert data["kv_source_layers"] == ([0, 0] if shared else [0, 1])
    latent = {key: data["latent"][key] for key in ("rank", "rope_dims")}
    assert latent == ({"rank": 24, "rope_dims": 8} if shared else {"rank": 12, "rope_dims": 20})
    assert data["latent"].get("per_layer", False) is not shared
    # float32, two layers of 128 values
    assert data["kv_bytes_per_token"] == [2 * 4 * 128, 4 * (32 if shared else 2 * 32)]
    done(source("llama"), out, *flags)
    tensors = load_file(out / "model.safetensors")
    planned = {t["name"]: t["after"] for t in data["tensors"] if t["after"] is not None}
    planned |= {t["name"]: t["shape"] for t in data["added_tensors"]}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert planned == shapes if shared else planned.keys() == shapes.keys()
    manifest = read_manifest(out)
    assert manifest["kv_cache"]["bytes_per_token"] == data["kv_bytes_per_token"]
    sizes = manifest["kv_cache"]["latent"]
    assert sizes == latent if shared else sum(sizes["rank"]) + sum(sizes["rope_dims"]) == 2 * 32
    recipe = manifest["recipe"]
    assert recipe["target"] == "kvpatch"
    assert ("kv_budget" in recipe, recipe["per_layer"]) == (not shared, not shared)
    assert ("rank" in recipe, recipe.get("share")) == (shared, 2 if shared else None)


def test_a_plan_for_people(source: Source, tmp_path: Path) -> None:
    plain = mla(source("llama"), tmp_path / "out", *_UNEVEN, "--dry-run")
    assert "latent of 12, rotary key of 20" in plain.out
    assert "open until it runs: sizes of each layer, by what it loses" in plain.out
    shared = mla(source("llama"), tmp_path / "out", *_SHARED, "--dry-run")
    assert "latent of 24, rotary key of 8" in shared.out
    assert "layers that share: 0-1" in shared.out
    uneven = ("--kv-budget", "50%", "--per-layer")
    normed = mla(source("qwen3"), tmp_path / "out", *uneven, "--dry-run")
    assert "open until it runs: sizes of each layer, by what it loses" in normed.out
    assert ", scales of keys 4" in normed.out


def test_a_recipe_gives_the_bytes_of_its_flags(source: Source, tmp_path: Path) -> None:
    flags = ("--kv-budget", "12.5%", "--per-layer", "--share", "2", "--layers", "0:2")
    expected = done(source("llama"), tmp_path / "flags", *flags)
    recipe = tmp_path / "mla.yaml"
    recipe.write_text(
        f"method: mla\nsource: {source('llama')}\noutput: {tmp_path / 'recipe'}\n"
        "kv_budget: 12.5%\nper_layer: true\nshare: 2\nlayers: '0:2'\n"
    )
    assert cli(["run", str(recipe)]).code == 0
    assert contents(tmp_path / "recipe") == contents(expected)


def _calibrated(source: Path, out: Path, text: Path) -> list[str]:
    flags = (*_SHARED, "--calibration", text, "--samples", 8, "--context", 24)
    return ["mla", str(source), str(out), *map(str, flags), "--max-shard-size", "40KB"]


def _kill_after_the_unit() -> None:
    """The process kills itself when both layers are calibrated."""
    original = Scratch.keep

    def keep(scratch: Scratch, *args: Any) -> None:
        original(scratch, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    Scratch.keep = keep  # type: ignore[method-assign, assignment]


def test_a_killed_run_continues_to_equal_bytes(source: Source, tmp_path: Path, text: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli(_calibrated(source("llama"), whole, text)).code == 0
    killed = run_child(_calibrated(source("llama"), out, text), _kill_after_the_unit)
    assert killed.code == -signal.SIGKILL
    assert not out.exists()
    assert cli(_calibrated(source("llama"), out, text)).code == 0
    assert contents(out) == contents(whole)


def test_card_and_report_tell_of_it(source: Source, tmp_path: Path, text: Path) -> None:
    held = tmp_path / "held-out.txt"
    held.write_text(random_text(200, seed=1))
    shared, uneven = tmp_path / "shared", tmp_path / "uneven"
    assert cli(_calibrated(source("llama"), shared, text)).code == 0
    done(source("llama"), uneven, *_UNEVEN)
    for out in (shared, uneven):
        flags = ("--text", held, "--against", source("llama"), "--context", 24, "--samples", 4)
        run = cli(["eval", str(out), *map(str, flags), "--save"])
        assert run.code == 0, run.err
    card = (shared / "README.md").read_text()
    for words in (
        "MLA 24+8, shared by 2 layers",
        "- mla\n- cla\n",
        "Adjacent layers share one latent and one rotary key",
        "(`kv_source_layers`): 0, 0.",
        "which that one's input cannot give",
        "| layers with keys and values of their own | 2 of 2 | 1 of 2 |",
    ):
        assert words in card
    card = (uneven / "README.md").read_text()
    sizes = read_manifest(uneven)["kv_cache"]["latent"]
    assert f"latent of {min(sizes['rank'])} to {max(sizes['rank'])}, rotary key of " in card
    assert "The budget was divided among the layers" in card
    run = cli(["report", str(shared), str(uneven), "--to", str(tmp_path / "report"), "--json"])
    assert run.code == 0, run.err
    rows = json.loads(run.out)["rows"]
    assert {r["model"]: r["kv_bytes_per_token"] for r in rows["pareto"]}["shared"] == 4 * 32
    lost = [row["lost_shared"] for row in rows["lost-energy-shared"]]
    assert lost[0] == 0 < lost[1]
    assert [row["rank"] for row in rows["lost-energy-uneven"]] == sizes["rank"]
    assert cli(["verify", str(shared), str(source("llama"))]).code == 0
