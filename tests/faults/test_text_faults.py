"""Texts, tokens and lengths that do not fit a model, from the command line: nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convert.checkpoint.reader import Checkpoint
from convert.loading import load_tokenizer
from tests.families.stock import make
from tests.families.texts import random_text, write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import cli, names

_GQA = ["--kv-heads", "2", "--merge", "svd", "--refit", "none", "--samples", "8", "--context", "16"]
_UPTRAIN = ["--tokens", "64", "--batch", "2", "--context", "16", "--device", "cpu"]


def _model(folder: Path, name: str = "llama") -> Path:
    """A model of 97 rows whose tokenizer has two tokens more."""
    make(name, settings(name)).save_pretrained(folder)
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, its conversion, and texts with and without the tokens."""
    root = tmp_path_factory.mktemp("texts")
    _model(root / "model")
    plain = random_text(600, seed=0)
    (root / "plain.txt").write_text(plain)
    (root / "used.txt").write_text(f"{plain[:300]}</tool>{plain[300:]}")
    rows = [plain[:200], None, plain[200:400], "", plain[400:]]
    (root / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    assert cli(["gqa", str(root / "model"), str(root / "gqa"), "--kv-heads", "2"]).code == 0
    return root


def _commands(place: Path, text: Path, out: Path) -> dict[str, list[str]]:
    model, result = str(place / "model"), str(place / "gqa")
    uptrain = ["uptrain", result, str(out), "--teacher", model, *_UPTRAIN]
    plain = str(place / "plain.txt")
    return {
        "calibration": ["gqa", model, str(out), "--calibration", str(text), *_GQA],
        "eval": ["eval", result, "--text", str(text), "--context", "16"],
        "source": ["eval", result, "--text", str(text), "--context", "16", "--against", model],
        "data": [*uptrain, "--data", str(text)],
        "eval text": [*uptrain, "--data", plain, "--eval-text", str(text)],
    }


_USES = ("calibration", "eval", "source", "data", "eval text")


@pytest.mark.parametrize("use", _USES)
def test_a_token_past_the_table_is_named(use: str, place: Path, tmp_path: Path) -> None:
    run = cli(_commands(place, place / "used.txt", tmp_path / "out")[use])
    assert run.code == 3, run.err
    said = "used.txt has the token '</tool>' with the id 98, but the embedding table of the model"
    assert f"{said} has 97 rows" in run.err
    assert run.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", _USES)
def test_tokens_that_no_text_uses_do_no_harm(use: str, place: Path, tmp_path: Path) -> None:
    run = cli(_commands(place, place / "plain.txt", tmp_path / "out")[use])
    assert run.code == 0, run.err


@pytest.mark.parametrize("use", ["calibration", "eval", "data", "eval text"])
def test_documents_without_text_are_said(use: str, place: Path, tmp_path: Path) -> None:
    run = cli(_commands(place, place / "rows.jsonl", tmp_path / "out")[use])
    assert run.code == 0, run.err
    (line,) = [line for line in run.err.splitlines() if "that have no text" in line]
    assert line.endswith("rows.jsonl that have no text (null or empty) and are skipped: 2")
    assert line.startswith("warning: ") == (use in {"calibration", "eval"})


@pytest.mark.parametrize("use", ["calibration", "eval", "data", "eval text"])
def test_a_file_that_is_no_text_is_refused_before_any_work(
    use: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded or a weight was read")

    for name in ("convert.loading.load_pair", "convert.training.run.load_model"):
        monkeypatch.setattr(name, work)
    monkeypatch.setattr(Checkpoint, "read", work)
    text = tmp_path / "text.jsonl"
    text.write_text('{"messages": []}\n')
    run = cli(_commands(place, text, tmp_path / "out")[use])
    assert run.code == 2, run.err
    assert f'{text}:1: expected an object with a key "text", found the keys messages' in run.err
    assert "hint: These are chat messages" in run.err
    assert names(tmp_path) == ["text.jsonl"]


@pytest.mark.parametrize("dry", [False, True])
def test_training_past_the_positions_is_refused_before_any_work(
    dry: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model(tmp_path / "gpt2", "gpt2")
    start = str(tmp_path / "gqa")
    assert cli(["gqa", str(tmp_path / "gpt2"), start, "--kv-heads", "2"]).code == 0
    before = names(tmp_path)
    text, out = str(place / "plain.txt"), str(tmp_path / "out")
    arguments = ["uptrain", start, out, "--data", text, *_UPTRAIN, *["--dry-run"] * dry]
    with monkeypatch.context() as patch:
        patch.setattr("convert.training.run.load_model", lambda *_, **__: 1 / 0)
        run = cli([*arguments, "--teacher", str(tmp_path / "gpt2"), "--context", "65"])
    assert run.code == 2, run.err
    assert f"--context 65 is more than the 64 positions of {start}" in run.err
    assert names(tmp_path) == before
    allowed = cli([*arguments, "--teacher", str(tmp_path / "gpt2"), "--context", "64"])
    assert allowed.code == 0, allowed.err


@pytest.mark.parametrize("dry", [False, True])
def test_training_past_what_the_model_was_made_for_is_said(
    dry: bool, place: Path, tmp_path: Path
) -> None:
    arguments = _commands(place, place / "plain.txt", tmp_path / "out")["data"]
    run = cli([*arguments, "--context", "70", "--tokens", "140", *["--dry-run"] * dry])
    assert run.code == 0, run.err
    said = "warning: --context 70 is more than the 64 tokens that "
    assert [line.startswith(said) for line in run.err.splitlines() if "warning" in line] == [True]


def test_a_teacher_without_the_positions_is_refused(place: Path, tmp_path: Path) -> None:
    _model(tmp_path / "gpt2", "gpt2")
    arguments = _commands(place, place / "plain.txt", tmp_path / "out")["data"]
    run = cli([*arguments, "--context", "70", "--teacher", str(tmp_path / "gpt2")])
    assert run.code == 2, run.err
    assert "--context 70 is more than the 64 positions of " in run.err
