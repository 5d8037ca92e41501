"""Calibrated runs that end early continue to the same bytes, and leave nothing of their own."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.checkpoint.reader import Checkpoint
from tests.families.stock import make
from tests.families.texts import random_text, write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import SignalAfterShard, cli, contents, names, run_child

Contents = dict[str, bytes | str | None]
_COMMANDS = {"gqa": ["--kv-heads", "2"], "cla": ["--share", "2"]}


@dataclass(frozen=True)
class SignalAfterResult:
    """The process sends itself a signal when so many results of calibration are kept."""

    signal: signal.Signals
    results: int

    def __call__(self) -> None:
        from convert.checkpoint.scratch import Scratch

        original, kept = Scratch.keep, []

        def keep(scratch: Scratch, *args: object) -> None:
            original(scratch, *args)  # type: ignore[arg-type]
            kept.append(scratch)
            if len(kept) == self.results:
                os.kill(os.getpid(), self.signal)

        Scratch.keep = keep  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration-faults")
    make("llama", {**settings("llama"), "num_hidden_layers": 4}).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    (folder / "train.txt").write_text(random_text(300, seed=0))
    return folder / "model"


def _arguments(command: str, source: Path, out: Path) -> list[str]:
    text = str(source.parent / "train.txt")
    how = ["--merge", "svd", "--calibration", text, "--samples", "8", "--context", "16"]
    return [command, str(source), str(out), *_COMMANDS[command], *how, "--max-shard-size", "40KB"]


@pytest.fixture(scope="module", params=_COMMANDS)
def expected(request: pytest.FixtureRequest, source: Path) -> tuple[str, Contents]:
    """A command, and what its undisturbed run gives."""
    command: str = request.param
    out = source.parent / command
    run = cli(_arguments(command, source, out))
    assert run.code == 0, run.err
    return command, contents(out)


def _staged(out: Path) -> Path:
    (folder,) = out.parent.glob(f".{out.name}.partial-*")
    return folder


def _kept(out: Path) -> list[Path]:
    """Files of what is calibrated; shards lie one folder above."""
    return sorted(_staged(out).glob("*/*.safetensors"))


@pytest.mark.parametrize("results", [1, 2])
def test_killed_during_calibration(
    source: Path, tmp_path: Path, expected: tuple[str, Contents], results: int
) -> None:
    command, wanted = expected
    arguments, out = _arguments(command, source, tmp_path / "out"), tmp_path / "out"
    killed = run_child(arguments, SignalAfterResult(signal.SIGKILL, results))
    assert killed.code == -signal.SIGKILL
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in _kept(out)}
    assert len(kept) == results
    # killed again, now between shards: what was calibrated is there and was not made anew
    assert run_child(arguments, SignalAfterShard(signal.SIGKILL, 1)).code == -signal.SIGKILL
    again = {path.name: path.stat().st_mtime_ns for path in _kept(out)}
    assert {name: again[name] for name in kept} == kept
    assert cli(arguments).code == 0
    assert contents(out) == wanted
    assert names(tmp_path) == ["out"]


def test_interrupted_run_keeps_its_results_and_says_so(
    source: Path, tmp_path: Path, expected: tuple[str, Contents]
) -> None:
    command, wanted = expected
    arguments, out = _arguments(command, source, tmp_path / "out"), tmp_path / "out"
    run = run_child(arguments, SignalAfterResult(signal.SIGINT, 1))
    assert (run.code, run.out) == (130, "")
    assert "run the same command again to continue" in run.err
    assert names(tmp_path) == [_staged(out).name]  # the lock is gone
    assert cli(arguments).code == 0
    assert contents(out) == wanted


def test_no_resume_calibrates_again(
    source: Path, tmp_path: Path, expected: tuple[str, Contents]
) -> None:
    command, wanted = expected
    arguments, out = _arguments(command, source, tmp_path / "out"), tmp_path / "out"
    assert run_child(arguments, SignalAfterResult(signal.SIGKILL, 1)).code == -signal.SIGKILL
    (result,) = _kept(out)
    result.write_bytes(b"worthless")
    assert cli([*arguments, "--no-resume"]).code == 0
    assert contents(out) == wanted


def test_another_text_is_another_conversion(source: Path, tmp_path: Path) -> None:
    arguments, out = _arguments("gqa", source, tmp_path / "out"), tmp_path / "out"
    assert run_child(arguments, SignalAfterResult(signal.SIGKILL, 1)).code == -signal.SIGKILL
    other = [*arguments, "--seed", "5"]
    run = cli(other)
    assert run.code == 0
    assert "is unfinished work of another conversion" in run.err
    clean = _arguments("gqa", source, tmp_path / "clean")
    assert cli([*clean, "--seed", "5"]).code == 0
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize("damage", [b"", b"noise"], ids=["empty", "noise"])
def test_damaged_result_is_calibrated_again(
    source: Path, tmp_path: Path, expected: tuple[str, Contents], damage: bytes
) -> None:
    """As after a loss of power, when the name is on disk and the content is not."""
    command, wanted = expected
    arguments, out = _arguments(command, source, tmp_path / "out"), tmp_path / "out"
    assert run_child(arguments, SignalAfterResult(signal.SIGKILL, 1)).code == -signal.SIGKILL
    (result,) = _kept(out)
    result.write_bytes(damage)
    run = cli(arguments)
    assert run.code == 0, run.err
    assert contents(out) == wanted


@pytest.mark.parametrize("flags", [["cla", "--share", "2", "--layers", "auto"], ["mla"]])
def test_weights_that_are_not_numbers_are_named_before_layers_are_chosen(
    source: Path, tmp_path: Path, flags: list[str]
) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method, *rest = flags
    rest = [*rest, "--merge", "svd"] if method == "cla" else ["--kv-budget", "50%"]
    run = cli([method, str(folder), str(tmp_path / "out"), *rest])
    assert run.code == 3, run.err
    assert "model.layers.1.self_attn.k_proj.weight" in run.err
    assert names(tmp_path) == ["model"]


def test_an_output_that_exists_is_refused_before_weights_are_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    run = cli(["mla", str(source), str(tmp_path / "out"), "--kv-budget", "50%"])
    assert run.code == 7, run.err


def test_numbers_too_small_for_what_is_fitted_are_refused(source: Path, tmp_path: Path) -> None:
    """Queries that read next to nothing would have to be larger than any float32."""
    model = shutil.copytree(source, tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] *= 1e-25
    save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    run = cli(_arguments("gqa", source, out)[:1] + [str(model), *_arguments("gqa", source, out)[2:]])
    assert (run.code, out.exists()) == (3, False)
    assert "error: layer 0 gives NaN or infinity on the calibration text once it is" in run.err
