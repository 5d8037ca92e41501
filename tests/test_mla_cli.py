"""``kvpatch mla`` as a user meets it: what it plans, writes, resumes and tells."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.reader import read_json
from convert.checkpoint.scratch import Scratch
from convert.evaluate import evaluate_checkpoint
from convert.verify import verify_checkpoint
from tests.families.stock import full_logits, load, random_ids
from tests.families.texts import random_text
from tests.faults.running import SignalAfterShard, cli, contents, names, run_child
from tests.helpers import assert_close, rewrite_tensors
from tests.mla import SMALL, Source, done, mla, sources
from tests.targets.latent_sources import real_float64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sources(tmp_path_factory.mktemp("mla"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(random_text(800, seed=0))
    return file


@pytest.mark.parametrize("target", ["native", "kvpatch"])
@pytest.mark.parametrize("share", [12.5, 25.0, 50.0])
def test_a_budget_is_kept(source: Source, tmp_path: Path, target: str, share: float) -> None:
    flags = ("--kv-budget", f"{share:g}%", "--target", target)
    out = done(source("llama"), tmp_path / "out", *flags)
    cache = read_manifest(out)["kv_cache"]
    before, after = cache["bytes_per_token"]
    assert 0.9 * share / 100 <= after / before <= share / 100
    sizes = cache["latent"]
    values = after // (4 * 2)  # float32, two layers
    assert values == sizes["rank"] + sizes["rope_dims"] + (target == "native")
    assert sizes["rope_dims"] % 2 == 0


def test_without_data_a_budget_goes_to_rotation_first(demo_model: Path, tmp_path: Path) -> None:
    text = demo_model.parent / "demo-text.txt"

    def kl(name: str, *flags: str) -> float:
        out = done(demo_model, tmp_path / name, "--target", "kvpatch", *flags)
        measured = evaluate_checkpoint(out, text, against=demo_model, context=128, samples=16)
        assert measured.against is not None
        return measured.against.kl

    chosen = kl("chosen", "--kv-budget", "25%")
    assert chosen < 0.5 * kl("of rank", "--rank", "48", "--rope-dims", "16")
    assert chosen < 1.2 * kl("even", "--rank", "32", "--rope-dims", "32")


def test_a_budget_without_positions_is_all_rank(source: Source, tmp_path: Path) -> None:
    out = done(source("gpt2"), tmp_path / "out", "--kv-budget", "25%")
    assert read_manifest(out)["kv_cache"]["latent"] == {"rank": 24, "rope_dims": 0}


def test_both_sizes_as_a_budget_are_the_same_conversion(source: Source, tmp_path: Path) -> None:
    given = done(source("llama"), tmp_path / "given", *SMALL)
    budget = done(source("llama"), tmp_path / "budget", "--kv-budget", "24+8")
    assert contents(given) == contents(budget)


def test_serving_writes_what_servers_load(source: Source, tmp_path: Path) -> None:
    """One KV head: the rotary key is all of it, and a latent of the input's width all else."""
    flags = ("--serving", "--kv-budget", "256+64")
    with real_float64():
        out = done(source("wide"), tmp_path / "out", *flags)
    config = read_json(out / "config.json")
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 320
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["rms_norm_eps"] == 1e-6
    assert not config["attention_bias"]
    stored = load_file(out / "model.safetensors")
    assert not [name for name in stored if name.endswith("bias")]
    assert "lm_head.weight" in stored
    expected, actual = load(source("wide")), load(out)
    ids = random_ids(expected)
    assert_close(full_logits(actual, ids), full_logits(expected, ids), atol=1e-9)


def test_a_plan_says_what_the_result_is(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = json.loads(mla(source("llama"), out, *SMALL, "--dry-run", "--json").out)
    assert not contents(tmp_path)
    assert data["latent"].pop("servers").keys() == {"vLLM", "SGLang", "llama.cpp"}
    assert data["latent"] == {"rank": 24, "rope_dims": 8}
    assert (data["class"], data["merge"]) == ("DeepseekV3ForCausalLM", None)
    assert data["kv_heads"] == [4, None]
    # a dim of the latent is there for its norm
    assert data["kv_bytes_per_token"] == [2 * 4 * 128, 2 * 4 * (24 + 1 + 8)]
    done(source("llama"), out, *SMALL)
    tensors = load_file(out / "model.safetensors")
    planned = {t["name"]: t["after"] for t in data["tensors"] if t["after"] is not None}
    planned |= {t["name"]: t["shape"] for t in data["added_tensors"]}
    assert planned == {name: list(tensor.shape) for name, tensor in tensors.items()}
    cache = read_manifest(out)["kv_cache"]
    assert cache["bytes_per_token"] == data["kv_bytes_per_token"]


@pytest.mark.usefixtures("no_weights")
def test_a_plan_of_a_share_shows_the_largest_split(source: Source, tmp_path: Path) -> None:
    def plan(budget: str) -> dict[str, Any]:
        run = mla(source("llama"), tmp_path / "out", "--kv-budget", budget, "--dry-run", "--json")
        shown: dict[str, Any] = json.loads(run.out)
        return shown

    whole = plan("25%")
    splits = [tuple(split) for split in whole["latent"]["splits"]]
    assert len(splits) == 5
    assert (whole["latent"]["rank"], whole["latent"]["rope_dims"]) == splits[-1]
    for rank, rope in splits:
        given = plan(f"{rank}+{rope}")
        assert given["kv_bytes_per_token"] == whole["kv_bytes_per_token"]
        assert given["bytes"][1] <= whole["bytes"][1]
        assert given["peak_ram"] <= whole["peak_ram"]
        assert "splits" not in given["latent"]
    people = mla(source("llama"), tmp_path / "out", "--kv-budget", "25%", "--dry-run").out
    assert "open until it runs: which split loses least, 27+4, 23+8, " in people


def test_what_was_open_is_chosen(source: Source, tmp_path: Path) -> None:
    flags = ("--kv-budget", "25%")
    plan = json.loads(mla(source("llama"), tmp_path / "a", *flags, "--dry-run", "--json").out)
    sizes = read_manifest(done(source("llama"), tmp_path / "b", *flags))["kv_cache"]["latent"]
    assert [sizes["rank"], sizes["rope_dims"]] in plan["latent"]["splits"]


def test_a_plan_for_people(source: Source, tmp_path: Path) -> None:
    run = mla(source("llama"), tmp_path / "out", *SMALL, "--dry-run")
    assert run.code == 0
    for words in (
        "latent of 24, rotary key of 8",
        "kv_a_proj_with_mqa.weight",
        "vLLM does not serve it: the attention has biases",
    ):
        assert words in run.out
    assert not contents(tmp_path)
    ours = mla(source("llama"), tmp_path / "out", *SMALL, "--dry-run", "--target", "kvpatch")
    assert "no class of transformers" not in ours.err
    large = mla(source("llama"), tmp_path / "out", "--kv-budget", "64+64", "--dry-run")
    assert "the cache gets no smaller: 1,032 bytes per token, before 1,024" in large.err


def _shards(source: Path, out: Path, text: Path) -> list[str]:
    """A calibrated run of several weight files."""
    flags = (*SMALL, "--calibration", text, "--samples", 8, "--context", 24)
    return ["mla", str(source), str(out), *map(str, flags), "--max-shard-size", "40KB"]


@dataclass(frozen=True)
class _KillAfterFirstLayer:
    """The process kills itself when the first layer is calibrated."""

    def __call__(self) -> None:
        original = Scratch.keep

        def keep(scratch: Scratch, *args: Any) -> None:
            original(scratch, *args)
            os.kill(os.getpid(), signal.SIGKILL)

        Scratch.keep = keep  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module")
def whole(source: Source, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli(_shards(source("llama"), out, text)).code == 0
    return contents(out)


def test_two_runs_give_equal_bytes(
    source: Source, tmp_path: Path, text: Path, whole: dict[str, Any]
) -> None:
    assert cli(_shards(source("llama"), tmp_path / "out", text)).code == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("fault", "finished"),
    [(_KillAfterFirstLayer(), 0), (SignalAfterShard(signal.SIGKILL, 3), 3)],
    ids=["calibrating", "writing"],
)
def test_a_killed_run_continues_to_equal_bytes(
    source: Source,
    tmp_path: Path,
    text: Path,
    whole: dict[str, Any],
    fault: Callable[[], None],
    finished: int,
) -> None:
    out = tmp_path / "out"
    assert run_child(_shards(source("llama"), out, text), fault).code == -signal.SIGKILL
    assert not out.exists()
    (staged,) = tmp_path.glob(".out.partial-*")
    before = {p.name: p.stat().st_ino for p in staged.glob("*.safetensors")}
    assert len(before) == finished
    assert cli(_shards(source("llama"), out, text)).code == 0
    assert contents(out) == whole
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert names(tmp_path) == ["out"]


def test_a_recipe_gives_the_bytes_of_its_flags(source: Source, tmp_path: Path) -> None:
    flags = ("--arch", "youtu", "--rope-select", "per-frequency", "--dtype", "bfloat16")
    expected = done(source("llama"), tmp_path / "flags", "--kv-budget", "24+8", *flags)
    recipe = tmp_path / "mla.yaml"
    recipe.write_text(
        f"method: mla\nsource: {source('llama')}\noutput: {tmp_path / 'unused'}\n"
        "kv_budget: 24+8\narch: youtu\nrope_select: per-frequency\ndtype: bfloat16\n"
    )
    out = tmp_path / "recipe"
    run = cli(["run", str(recipe), "--set", f"output={out}"])
    assert run.code == 0, run.err
    assert contents(out) == contents(expected)
    misspelt = cli(["run", str(recipe), "--set", "rank_dims=3"])
    assert misspelt.code == 2
    assert "rank_dims" in misspelt.err


@pytest.fixture(scope="module")
def calibrated(source: Source, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated result that was measured against its source."""
    out = tmp_path_factory.mktemp("calibrated") / "mla"
    done(source("llama"), out, *SMALL, "--calibration", text, "--samples", 8, "--context", 24)
    assert _measured(out, source("llama"))["against"]["kl"] > 0
    return out


def _measured(out: Path, source: Path) -> dict[str, Any]:
    """What ``kvpatch eval`` saves of a result, on a text of its own."""
    text = source.parent / "held-out.txt"
    text.write_text(random_text(200, seed=1))
    flags = ("--text", text, "--against", source, "--context", 24, "--samples", 4)
    run = cli(["eval", str(out), *map(str, flags), "--save", "--json"])
    assert run.code == 0, run.err
    measured: dict[str, Any] = json.loads(run.out)
    return measured


def test_the_manifest_and_the_card_say_what_was_done(calibrated: Path, text: Path) -> None:
    manifest = read_manifest(calibrated)
    recipe = manifest["recipe"]
    assert {key: recipe[key] for key in ("method", "rank", "rope_dims", "refit", "target")} == {
        "method": "mla",
        "rank": 24,
        "rope_dims": 8,
        "refit": "qo",
        "target": "native",
    }
    assert "kv_budget" not in recipe
    assert manifest["kv_cache"]["kv_heads"] == [4, None]
    assert manifest["calibration"]["text"] == text.name
    assert manifest["converted"] == ["k", "o", "q", "v"]
    for number, layer in enumerate(manifest["layers"]):
        assert (layer["layer"], layer["rank"], layer["rope_dims"]) == (number, 24, 8)
        for share in ("lost_energy_rope", "lost_energy_latent"):
            assert 0 < layer[share] < 1
        assert layer["attention_kl"] > 0
        assert 0 < layer["output_error"] < 1
    card = (calibrated / "README.md").read_text()
    for words in (
        "MLA 24+8",
        "- mla\n",
        "latent of 24, rotary key of 8",
        "by least squares on the calibration text",
        f"tokens of {text.name}",
        "stock DeepseekV3ForCausalLM",
        "| held-out.txt | 4 of 24 tokens",
    ):
        assert words in card
    assert "--save" not in card


def test_verify_passes_and_finds_a_change(calibrated: Path, source: Source, tmp_path: Path) -> None:
    run = cli(["verify", str(calibrated), str(source("llama"))])
    assert run.code == 0, run.out + run.err
    # a model whose factors the class takes up in tensors outside of the attention
    for name in ("gemma", "granite:bias-tied"):
        out = done(source(name), tmp_path / "out", *SMALL, "--overwrite")
        checks = {c.name: c for c in verify_checkpoint(out, source(name), run=False)}
        assert {c.status for c in checks.values()} == {"ok"}, checks
        assert not checks["untouched tensors"].detail.startswith("0 ")
    up = "model.layers.1.mlp.up_proj.weight"
    changed = load_file(out / "model.safetensors")[up] + 1
    rewrite_tensors(out, {up: changed})
    failed = {c.name for c in verify_checkpoint(out, source(name), run=False) if c.status != "ok"}
    assert failed == {"hashes", "untouched tensors"}


def test_a_report_draws_it_beside_a_merge(calibrated: Path, source: Source, tmp_path: Path) -> None:
    gqa = tmp_path / "gqa"
    assert cli(["gqa", str(source("llama")), str(gqa), "--kv-heads", "2"]).code == 0
    _measured(gqa, source("llama"))
    to = tmp_path / "report"
    run = cli(["report", str(calibrated), str(gqa), "--to", str(to), "--json"])
    assert run.code == 0, run.err
    rows: dict[str, Any] = json.loads(run.out)["rows"]
    sizes = {row["model"]: row["kv_bytes_per_token"] for row in rows["pareto"]}
    assert sizes == {"llama": 1024, "mla": 264, "gqa": 512}
    layers = read_manifest(calibrated)["layers"]
    assert rows["lost-energy-mla"] == [
        {
            "layer": layer["layer"],
            "source": layer["layer"],
            "rank": 24,
            "rope_dims": 8,
            "lost_rope": layer["lost_energy_rope"],
            "lost_latent": layer["lost_energy_latent"],
            "lost_shared": None,
            "attention_kl": layer["attention_kl"],
            "output_error": layer["output_error"],
        }
        for layer in layers
    ]
    assert len(rows["similarity-mla"]) == len(layers) ** 2
    for chart in rows:
        assert {p.suffix for p in to.glob(f"{chart}.*")} == {".png", ".svg", ".csv"}
    drawn = (to / "lost-energy-mla.svg").read_text()
    assert "lost with the rotation" in drawn
    assert "rank 24 + 8 rotary" in drawn


def test_a_report_of_weights_alone_draws_what_is_predicted(source: Source, tmp_path: Path) -> None:
    out = done(source("gpt2"), tmp_path / "out", "--kv-budget", "25%")
    _measured(out, source("gpt2"))
    run = cli(["report", str(out), "--to", str(tmp_path / "report"), "--json"])
    assert run.code == 0, run.err
    rows = json.loads(run.out)["rows"]
    assert rows.keys() == {"pareto", "lost-energy-out"}
    assert all(row["attention_kl"] is None for row in rows["lost-energy-out"])


def test_inspect_names_the_command_and_the_class(source: Source, tmp_path: Path) -> None:
    shown = {
        "llama": "DeepseekV3ForCausalLM",
        "phi": "KvpatchPhiForCausalLM",
        "gpt2": "KvpatchGPT2ForCausalLM",
        "mistral:window": "KvpatchMistralForCausalLM",
        "qwen3": "KvpatchQwen3ForCausalLM",
        "persimmon": None,
        "bloom": None,
        "mixtral": None,
    }
    for name, target in shown.items():
        data = json.loads(cli(["inspect", str(source(name)), "--json"]).out)
        said = data["model"]["conversions"]["mla"]
        assert said == (None if target is None else {"target": target})
        (row,) = (row for row in data["kv"] if row["design"].startswith("MLA"))
        assert (row["command"] is not None) == (target is not None)
        if target is None:
            continue
        _, method, *flags = row["command"].split()
        assert method == "mla"
        out = done(source(name), tmp_path / name, *flags)
        assert read_json(out / "config.json")["architectures"] == [target]


def test_verbose_tells_of_each_layer(source: Source, tmp_path: Path) -> None:
    run = mla(source("llama"), tmp_path / "out", *SMALL, "--verbose")
    assert run.code == 0
    assert run.err.count("lost_energy_rope") == 2
