"""``kvpatch uptrain`` of results in stock classes with latents, which are trained as ours."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.checkpoint.manifest import read_manifest
from tests.families.stock import full_logits, load, make, random_ids
from tests.families.texts import write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import Child, KillInside, Run, cli, contents, names
from tests.helpers import assert_close
from tests.targets.latent_sources import real_float64
from tests.training.small import FLAGS, Place, weights

_SIZES = ("--rank", "24", "--rope-dims", "8")
_WIDE = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 4}

# form -> family, its settings, dtype, and how it is converted
_FORMS: Mapping[str, tuple[str, Mapping[str, int], torch.dtype, tuple[str, ...]]] = {
    "constant": ("llama", {}, torch.float64, _SIZES),
    "narrow": ("llama", {}, torch.bfloat16, _SIZES),
    "query latent": ("granite:bias-tied", {}, torch.float32, (*_SIZES, "--arch", "youtu")),
    "serving": (
        "llama",
        _WIDE,
        torch.float32,
        ("--serving", "--rope-select", "stride", "--kv-budget", "256+64"),
    ),
}

# source and start of a form
Starts = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    root = tmp_path_factory.mktemp("native")

    @cache
    def made(form: str) -> tuple[Path, Path]:
        family, keys, dtype, flags = _FORMS[form]
        source, start = (root / f"{form} {name}" for name in ("source", "start"))
        torch.manual_seed(7)
        make(family, {**settings(family), **keys}).to(dtype).save_pretrained(source)
        write_tokenizer(source)
        with real_float64() if dtype is torch.float64 else nullcontext():
            run = cli(["mla", str(source), str(start), "-q", *flags])
        assert run.code == 0, run.err
        return source, start

    return made


def _arguments(place: Place, source: Path, start: Path, out: Path, *flags: str) -> list[str]:
    base = ["uptrain", str(start), str(out), "--data", str(place.text), "--teacher", str(source)]
    return [*base, *FLAGS, *place.measured, "--tokens", "496", *flags]


@pytest.mark.parametrize("form", _FORMS)
def test_a_result_has_the_form_of_its_start(
    form: str, place: Place, starts: Starts, tmp_path: Path
) -> None:
    """What was measured on our class while training is what the stock class gives."""
    (source, start), out = starts(form), tmp_path / "out"
    rate = "0.00003" if form == "serving" else "0.0003"  # of little that was lost, little is won
    run = cli(_arguments(place, source, start, out, "--lr", rate))
    assert run.code == 0, run.err
    assert names(tmp_path) == ["out"]
    before, after = contents(start), contents(out)
    assert after.keys() == before.keys() | {"training.png"}
    made = {"README.md", "kvpatch.json", "model.safetensors", "training.png"}
    assert all(after[name] == before[name] for name in after.keys() - made)
    old, new = weights(start), weights(out)
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {
        n: (t.dtype, t.shape) for n, t in new.items()
    }
    curve = read_manifest(out)["trainings"][0]["curve"]
    assert curve[-1]["eval_kl"] < curve[0]["eval_kl"]
    rounded = 0.02 if form == "narrow" else 1e-4
    for folder, point in ((start, curve[0]), (out, curve[-1])):
        assert point["eval_kl"] == pytest.approx(place.distance(folder, source), rel=rounded)
    verified = cli(["verify", str(out), str(source)])
    assert verified.code == 0, verified.out + verified.err


def test_the_record_tells_of_both_forms(place: Place, starts: Starts, tmp_path: Path) -> None:
    (source, start), out, ours = starts("narrow"), tmp_path / "out", tmp_path / "ours"
    flags = ("--lora", "2", "--groups", "attention", "--tokens", "62")
    assert cli(_arguments(place, source, start, out, *flags)).code == 0
    export = ["export", str(start), str(ours), "--target", "kvpatch", "--dtype", "float32"]
    assert cli([*export, "-q"]).code == 0
    first, last = read_manifest(start), read_manifest(out)
    for key in ("source", "recipe", "layers", "kv_cache", "architecture"):
        assert last[key] == first[key]
    (training,) = last["trainings"]
    record = first["files"]["model.safetensors"]
    assert training["start"] == {"files": {"model.safetensors": record}}
    record = read_manifest(ours)["files"]["model.safetensors"]
    assert training["form"]["files"] == {"model.safetensors": record}
    assert training["form"]["architecture"] == "KvpatchLlamaForCausalLM"
    assert 0 < training["form"]["norm_error"] < 2**-9
    card = (out / "README.md").read_text()
    assert "Trained was KvpatchLlamaForCausalLM, which computes the same" in card
    assert "# stock DeepseekV3ForCausalLM" in card


_KILLS = {
    "in a step": KillInside("convert.training.loop", "Training._step", 7),
    "before it is exported back": KillInside("convert.training.native", "convert", 2),
    "after it was exported back": KillInside("convert.training.native", "convert", 2, after=True),
}


@pytest.mark.parametrize("where", _KILLS)
def test_a_killed_run_goes_on_to_the_same_bits(
    where: str, place: Place, starts: Starts, tmp_path: Path
) -> None:
    (source, start), broken = starts("constant"), tmp_path / "broken"
    whole = start.with_name("whole")
    if not whole.exists():
        assert cli(_arguments(place, source, start, whole)).code == 0
    arguments = _arguments(place, source, start, broken)
    assert Child(arguments, _KILLS[where]).wait().code == -signal.SIGKILL
    assert not broken.exists()
    logits = None
    (scratch,) = tmp_path.glob(".broken.partial-*/.scratch")
    if (scratch / "trained").exists():
        ours = load(scratch / "trained")
        ids = random_ids(ours, 12)
        logits = full_logits(ours, ids)
    run = cli(arguments)
    assert run.code == 0, run.err
    assert contents(broken) == contents(whole)
    assert names(tmp_path) == ["broken"]
    assert (logits is not None) == ("exported back" in where)
    if logits is not None:
        native = load(broken)
        assert type(native).__name__ == "DeepseekV3ForCausalLM"
        assert_close(full_logits(native, ids), logits, atol=1e-10)


def _run(place: Place, starts: Starts, out: Path, *flags: str) -> Run:
    source, start = starts("constant")
    return cli(_arguments(place, source, start, out, *flags))


def test_a_plan_says_what_is_trained(place: Place, starts: Starts, tmp_path: Path) -> None:
    run = _run(place, starts, tmp_path / "out", "--dry-run", "--json")
    assert json.loads(run.out)["detour"] == "KvpatchLlamaForCausalLM"
    shown = _run(place, starts, tmp_path / "out", "--dry-run").out
    assert "in the form of" in shown
    assert not names(tmp_path)


def test_a_norm_that_does_something_is_refused(
    place: Place, starts: Starts, tmp_path: Path
) -> None:
    source, start = starts("constant")
    moved = tmp_path / "moved"
    load(start).save_pretrained(moved)
    for name in ("tokenizer.json", "tokenizer_config.json", "kvpatch.json"):
        (moved / name).write_bytes((start / name).read_bytes())
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"][24] += 1.0
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    run = cli(_arguments(place, source, moved, tmp_path / "out"))
    assert run.code == 3
    assert "layer 1: the latent norm changes latents" in run.err
    assert names(tmp_path) == ["moved"]
