"""``kvpatch uptrain`` from the command line, on every kind of result."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.checkpoint.manifest import read_manifest, rewrite_manifest
from convert.checkpoint.writer import write_file
from convert.training.data import IGNORED, Batch, Sequences, stack
from convert.training.groups import parameter_groups
from tests.faults.running import Child, KillInside, cli
from tests.helpers import assert_close, assert_equal, load_folder
from tests.training.small import Place, weights


def _held(place: Place) -> tuple[str, ...]:
    return ("--eval-text", str(place.held), "--eval-samples", "4")


@pytest.mark.parametrize("kind", ["mqa", "cla", "mla"])
def test_a_result_is_a_normal_folder_that_is_nearer_to_its_source(
    kind: str, place: Place, tmp_path: Path
) -> None:
    start, out = place.converted(kind), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    run = place.uptrain(start, out, *_held(place), "--lr", "0.001")
    assert run.code == 0, run.err
    assert run.out == f"{out}\n"
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before
    assert {path.name for path in out.iterdir()} == {*before, "training.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    same = before.keys() - {"README.md", "kvpatch.json", "model.safetensors"}
    assert all((out / name).read_bytes() == before[name] for name in same)
    old, new = weights(start), weights(out)
    assert old.keys() == new.keys()
    assert all(not torch.equal(old[name], new[name]) for name in old if "kv_b" not in name)
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {
        n: (t.dtype, t.shape) for n, t in new.items()
    }
    (training,) = read_manifest(out)["trainings"]
    curve = training["curve"]
    assert training["tokens"] == 512
    assert training["packed"]
    assert curve[-1]["tokens"] == 512
    assert curve[-1]["eval_kl"] < curve[0]["eval_kl"]
    card = (out / "README.md").read_text()
    assert "![Losses against tokens](training.png)" in card
    assert f"{curve[0]['eval_kl']:.4f} | {curve[-1]['eval_kl']:.4f}" in card
    assert "bit for bit" not in card
    verified = cli(["verify", str(out), str(place.source())])
    assert verified.code == 0, verified.out + verified.err
    assert "the model was trained afterwards" in verified.out


@pytest.mark.parametrize("sharded", [False, True])
def test_names_of_a_wrapper_change_nothing(sharded: bool, place: Place, tmp_path: Path) -> None:
    start, wrapped = place.converted("cla"), tmp_path / "wrapped"
    shutil.copytree(start, wrapped)
    file = wrapped / "model.safetensors"
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}
    if sharded:
        file = file.rename(wrapped / "model-00001-of-00001.safetensors")
    save_file(tensors, file)
    manifest = read_manifest(start)
    record = manifest["files"].pop("model.safetensors")
    manifest["files"][file.name] = record
    if sharded:
        assert cli(["reindex", str(wrapped)]).code == 0
        manifest["files"]["model.safetensors.index.json"] = record
    (wrapped / "kvpatch.json").write_text(json.dumps(manifest))
    for folder, out in ((start, "plain"), (wrapped, "out")):
        run = place.uptrain(folder, tmp_path / out, "--tokens", "64")
        assert run.code == 0, run.err
    expected = weights(tmp_path / "plain")
    found = load_file(tmp_path / "out" / file.name)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(found[name], tensor)
    verified = cli(["verify", str(tmp_path / "out")])
    assert verified.code == 0, verified.out + verified.err


def test_the_curve_is_the_distance_that_stock_models_have(place: Place, tmp_path: Path) -> None:
    """Evaluated KL against both models run on each document alone."""
    start, out = place.converted("gqa"), tmp_path / "out"
    assert place.uptrain(start, out, *place.measured, "--tokens", "62").code == 0
    have = read_manifest(out)["trainings"][0]["curve"]
    for folder, point in ((start, have[0]), (out, have[-1])):
        distance = place.distance(folder, place.source())
        assert point["eval_kl"] == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize(("batch", "passes"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_follows_the_mean_over_the_tokens_of_all_passes(
    batch: int, passes: int, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences differ in their number of targets: a mean of means would be another gradient."""
    start, text = place.converted("gqa"), tmp_path / "documents.jsonl"
    documents = [chr(40 + n) * (2 if n < 80 else 16) for n in range(86)]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    gradients: list[torch.Tensor] = []

    def step(self: torch.optim.AdamW, closure: object = None) -> None:
        gradients.extend(p.grad.clone() for g in self.param_groups for p in g["params"])

    seen: list[Batch] = []
    take = Sequences.take

    def taken(self: Sequences, count: int) -> list[Batch]:
        seen.extend(found := take(self, count))
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(Sequences, "take", taken)
    flags = ("--data", text, "--tokens", "64", "--clip", "1e9", "--batch", batch)
    assert place.uptrain(start, tmp_path / "out", *flags, "--grad-accumulation", passes).code == 0
    tokens, positions, targets = stack(seen)
    counts = (targets != IGNORED).sum(1)
    assert len(counts) == 4
    assert len(set(counts.tolist())) > 1
    student, teacher = load_folder(start), load_folder(place.source())
    ours, theirs = (
        model(tokens, position_ids=positions, use_cache=False).logits[targets != IGNORED]
        for model in (student, teacher)
    )
    loss = torch.nn.functional.kl_div(
        ours.log_softmax(-1),
        theirs.detach().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    groups = parameter_groups(student, "all")
    parameters = [weight for group in groups for weight in group.parameters.values()]
    want = torch.autograd.grad(loss, parameters)
    for have, truth in zip(gradients, want, strict=True):
        assert_close(have, truth, atol=2e-6)


_KILLS = {
    "in a step": KillInside("convert.training.loop", "Training._step", 7),
    "before the name of a checkpoint": KillInside("convert.training.checkpoints", "settle", 2),
    "after the name of a checkpoint": KillInside("convert.training.checkpoints", "settle", 2, True),
    "in publication": KillInside("convert.training.publish", "copy_file", 2),
}


@pytest.mark.parametrize("where", _KILLS)
def test_a_killed_run_goes_on_to_the_same_bits(where: str, place: Place, tmp_path: Path) -> None:
    start = place.converted("cla")
    flags = (*_held(place), "--checkpoint-every", "96", "--groups", "attention-then-all")
    whole, broken = place.root / "whole", tmp_path / "broken"
    if not whole.exists():
        assert place.uptrain(start, whole, *flags).code == 0
    arguments = place.arguments(start, broken, *flags)
    assert Child(arguments, _KILLS[where]).wait().code == -signal.SIGKILL
    assert not broken.exists()
    run = cli([argument for argument in arguments if argument != "--quiet"])
    assert run.code == 0, run.err
    assert "continuing after" in run.err
    for path in whole.iterdir():
        assert (broken / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_adapters_are_merged_into_ordinary_weights(place: Place, tmp_path: Path) -> None:
    start, out = place.converted("gqa"), tmp_path / "out"
    flags = (
        "--lora",
        "2",
        "--groups",
        "attention",
        "--lr",
        "0.001",
        *_held(place),
        "--tokens",
        "4096",
    )
    run = place.uptrain(start, out, *flags)
    assert run.code == 0, run.err
    old, new = weights(start), weights(out)
    for name, weight in old.items():
        if "_proj" not in name or "mlp" in name:
            assert_equal(new[name], weight)
        else:
            change = torch.linalg.svdvals((new[name] - weight).double())
            assert float(change[1]) > 1e-4
            assert float(change[2:].max()) < 1e-5
    (training,) = read_manifest(out)["trainings"]
    with torch.no_grad():
        load_folder(out)
    assert training["curve"][-1]["eval_kl"] < training["curve"][0]["eval_kl"]


def test_training_stops_at_a_target(place: Place, tmp_path: Path) -> None:
    start, out = place.converted("gqa"), tmp_path / "out"
    flags = (*_held(place), "--kl-target", "1e3", "--eval-every", "64", "--json")
    run = place.uptrain(start, out, *flags)
    assert run.code == 0, run.err
    (training,) = read_manifest(out)["trainings"]
    assert training["reached"]
    assert training["tokens"] == 64
    assert json.loads(run.out) == {"output": str(out)}


def test_a_trained_model_is_trained_again(place: Place, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ("--tokens", "64", "--kl", "0", "--ce", "1")
    assert place.uptrain(place.converted("gqa"), first, *flags).code == 0
    assert place.uptrain(first, second, *flags, "--gradient-checkpointing").code == 0
    trainings = read_manifest(second)["trainings"]
    assert len(trainings) == 2
    assert (second / "README.md").read_text().count("## Training\n") == 2


def test_measurements_of_the_weights_before_do_not_go_along(place: Place, tmp_path: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(place.converted("gqa"), start)
    (start / ".eval_results").mkdir()
    written = {".eval_results/arc.yaml": write_file(start / ".eval_results/arc.yaml", b"score")}
    measured = {"tasks": ["of before"], "retrieval": ["of before"], "evaluations": ["of before"]}
    rewrite_manifest(start, read_manifest(start) | measured, written)
    run = place.uptrain(start, out, "--tokens", "32")
    assert run.code == 0, run.err
    manifest = read_manifest(out)
    assert not manifest.keys() & {"tasks", "retrieval"}
    assert manifest["evaluations"] == []
    assert manifest["trainings"][0]["evaluations_before"] == ["of before"]
    assert not (out / ".eval_results").exists()
    assert cli(["verify", str(out), "--files-only"]).code == 0


def test_a_dry_run_writes_nothing(place: Place, tmp_path: Path) -> None:
    run = place.uptrain(place.converted("cla"), tmp_path / "out", "--dry-run", "--json")
    assert run.code == 0, run.err
    plan = json.loads(run.out)
    assert (plan["steps"], plan["tokens_per_step"]) == (16, 32)
    assert plan["lr"] == pytest.approx(1.5e-4)
    shapes = weights(place.converted("cla"))
    assert plan["parameters"] == sum(weight.numel() for weight in shapes.values())
    assert not list(tmp_path.iterdir())
    table = place.uptrain(place.converted("cla"), tmp_path / "out", "--dry-run").out
    assert "16 of 32 tokens on one device" in table


def test_a_recipe_is_run(place: Place, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: uptrain\nsource: {place.converted('gqa')}\noutput: {tmp_path / 'out'}\n"
        f"teacher: {place.source()}\ndata: {place.text}\ntokens: 64\nbatch: 2\ncontext: 16\n"
        "device: cpu\n"
    )
    run = cli(["run", str(recipe), "-q", "--set", "tokens=96"])
    assert run.code == 0, run.err
    assert read_manifest(tmp_path / "out")["trainings"][0]["tokens"] == 96


_WRONG: dict[str, tuple[str, tuple[str, ...], int, str]] = {
    "tokens": ("gqa", ("--tokens", "many"), 2, "tokens: not a number of tokens"),
    "no loss": ("gqa", ("--kl", "0"), 2, "kl and ce are both 0"),
    "target without text": ("gqa", ("--kl-target", "1"), 2, "kl_target needs eval_text"),
    "no such text": ("gqa", ("--data", "none.txt"), 2, "cannot read the text none.txt"),
    "groups": ("gqa", ("--groups", "half"), 2, "groups: must be"),
    "unstable": ("gqa", ("--lr", "1e30", "--clip", "1e30"), 6, "the loss is not finite at step"),
}


@pytest.mark.parametrize("what", _WRONG)
def test_what_cannot_be_done_is_said(what: str, place: Place, tmp_path: Path) -> None:
    kind, flags, code, message = _WRONG[what]
    run = place.uptrain(place.converted(kind), tmp_path / "out", *flags)
    assert run.code == code, run.err
    assert message in run.err
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said_of_uptraining(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.resources.available_ram", lambda: 1_000_000)
    run = place.uptrain(place.converted("gqa"), tmp_path / "out")
    assert run.code == 4
    assert "error: uptraining needs" in run.err


def test_a_source_that_kvpatch_did_not_make_is_refused(place: Place, tmp_path: Path) -> None:
    run = place.uptrain(place.source(), tmp_path / "out")
    assert run.code == 3
    assert "was not made by kvpatch" in run.err


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors"])
def test_files_that_are_not_those_of_the_conversion_are_refused_at_once(
    name: str, place: Place, tmp_path: Path
) -> None:
    start = shutil.copytree(place.converted("gqa"), tmp_path / "start")
    (start / name).rename(start / "model-00001-of-00001.safetensors")
    if name == "model.safetensors":
        assert cli(["reindex", str(start)]).code == 0
    else:
        (start / "model-00001-of-00001.safetensors").unlink()
    run = place.uptrain(start, tmp_path / "out", "--dry-run")
    assert (run.code, run.out) == (3, "")
    assert f"the files of start are not those of its kvpatch.json: {name} is missing" in (
        run.err.replace("model-00001-of-00001.safetensors is not in it; ", "")
    )


def test_a_local_teacher_must_be_given(place: Place, tmp_path: Path) -> None:
    start = place.converted("gqa")
    base = ["uptrain", str(start), str(tmp_path / "out"), "--data", str(place.text)]
    run = cli([*base, "--tokens", "64"])
    assert run.code == 2
    assert "Give --teacher FOLDER" in run.err


def test_a_text_that_was_trained_on_is_no_measurement(place: Place, tmp_path: Path) -> None:
    """Nor is it one of what is exported from the trained model."""
    out, native = tmp_path / "out", tmp_path / "native"
    assert place.uptrain(place.converted("mla"), out, "--tokens", "64").code == 0
    assert cli(["export", str(out), str(native), "--target", "native", "-q"]).code == 0
    for folder in (out, native):
        text = ("--text", str(place.text), "--context", "16")
        run = cli(["eval", str(folder), *text, "--save"])
        assert run.code == 2
        assert "was trained on" in run.err
    assert "Then its weights were changed, as by training." in (native / "README.md").read_text()
