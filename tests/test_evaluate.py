"""Perplexity, KL and agreement against plain loops over single tokens."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from convert.cli import app
from convert.evaluate import evaluate_checkpoint, windows_of
from convert.pipeline import convert
from convert.recipe import make_recipe
from kvpatch.errors import InputModelError, ResourceError, UsageError, VerificationError
from tests.families.stock import make
from tests.families.tiny import settings
from tests.helpers import load_folder, rewrite_tensors

WORDS = (
    "Petra is in the kitchen with a brown hat. Oren is in the barn with a black map. "
    "Where is the brown hat? Petra has the brown hat. Oren leaves the barn. " * 20
)
FIRST = torch.tensor([0])  # the bundled tokenizer opens a text with <s>


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(WORDS)
    return file


@pytest.fixture(scope="module")
def pooled(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pooled") / "mqa"
    return convert(make_recipe({"method": "mqa", "source": str(demo_model), "output": str(out)}))


def _token_ids(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(WORDS, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


@torch.no_grad()
def _scored_by_hand(folder: Path, windows: list[torch.Tensor], new: int) -> torch.Tensor:
    """Log probabilities [N, vocabulary] of the scored positions, one window at a time.

    Of every window but the first only the last ``new`` predictions are scored.
    """
    model, rows = load_folder(folder), []
    for index, window in enumerate(windows):
        logits = model(window[None]).logits[0, :-1]
        rows.append((logits if index == 0 else logits[-new:]).double().log_softmax(-1))
    return torch.cat(rows)


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (64, 16)])
def test_numbers_agree_with_a_plain_loop(
    demo_model: Path, pooled: Path, text: Path, context: int, stride: int
) -> None:
    result = evaluate_checkpoint(
        pooled, text, against=demo_model, context=context, stride=stride, samples=5, batch=2
    )
    ids, new = _token_ids(demo_model), min(stride, context - 1)
    windows = [torch.cat([FIRST, ids[i * new : i * new + context - 1]]) for i in range(5)]
    targets = torch.cat([w[1:] if i == 0 else w[-new:] for i, w in enumerate(windows)])
    ours = _scored_by_hand(pooled, windows, new)
    truth = _scored_by_hand(demo_model, windows, new)
    nll = -ours[torch.arange(len(targets)), targets].mean()
    kl = (truth.exp() * (truth - ours)).sum(-1).mean()
    assert result.tokens == len(targets)
    # logits are float32: differences of 1e-5 are their rounding in another batch shape
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.against is not None
    assert result.against.kl == pytest.approx(float(kl), rel=1e-4)
    assert result.against.top1 == pytest.approx(
        float((ours.argmax(-1) == truth.argmax(-1)).double().mean()), abs=1e-9
    )


def test_a_model_does_not_differ_from_itself(demo_model: Path, text: Path) -> None:
    result = evaluate_checkpoint(demo_model, text, against=demo_model, context=64, samples=3)
    assert result.against is not None
    assert result.against.kl == 0.0
    assert result.against.top1 == 1.0
    assert result.against.perplexity == result.perplexity


def test_windows_without_and_with_a_first_token() -> None:
    ids = torch.arange(10)
    empty = torch.empty(0, dtype=torch.long)
    assert windows_of(ids, empty, context=4, stride=4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of(ids, torch.tensor([99]), context=4, stride=4).tolist() == [
        [99, 0, 1, 2],
        [99, 3, 4, 5],
        [99, 6, 7, 8],
    ]
    assert windows_of(ids[:3], empty, context=4, stride=4).shape == (0, 4)


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (64, 65), (64, 0)])
def test_impossible_windows_are_refused(
    demo_model: Path, text: Path, context: int, stride: int
) -> None:
    with pytest.raises(UsageError, match="--context"):
        evaluate_checkpoint(demo_model, text, context=context, stride=stride)


def test_contexts_past_what_the_model_was_made_for(
    demo_model: Path, text: Path, tmp_path: Path
) -> None:
    """With RoPE they are measured and said, with a table of positions they cannot be."""
    warnings: list[str] = []
    result = evaluate_checkpoint(
        demo_model, text, against=demo_model, context=600, samples=1, warn=warnings.append
    )
    window = torch.cat([FIRST, _token_ids(demo_model)[:599]])
    likely = _scored_by_hand(demo_model, [window], 599)
    nll = -likely[torch.arange(599), window[1:]].mean()
    # logits are float32: differences of 1e-5 are their rounding in another batch shape
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    said = "--context 600 is more than the 512 tokens that {} was made for; what it does beyond"
    assert [warning.startswith(said.format(demo_model)) for warning in warnings] == [True]
    make("gpt2", {**settings("gpt2"), "vocab_size": 512}).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, tmp_path)
    assert evaluate_checkpoint(tmp_path, text, samples=1).context == 64
    with pytest.raises(UsageError, match=f"65 is more than the 64 positions of {tmp_path}"):
        evaluate_checkpoint(tmp_path, text, context=65)
    with pytest.raises(UsageError, match="more than the 64 positions of its source"):
        evaluate_checkpoint(demo_model, text, against=tmp_path, context=65)


def test_rows_are_joined_by_the_end_of_a_document(demo_model: Path, tmp_path: Path) -> None:
    """Null and empty rows are skipped and said, by the command too."""
    documents = [WORDS[:200], None, WORDS[300:900], "", WORDS[100:400]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    warnings: list[str] = []
    result = evaluate_checkpoint(demo_model, file, context=64, warn=warnings.append)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids: list[int] = []
    for document in filter(None, documents):
        ids += [*([1] if ids else []), *tokenizer(document)["input_ids"][1:]]
    windows = [
        torch.cat([FIRST, torch.tensor(ids[start : start + 63])])
        for start in range(0, len(ids) - 62, 63)
    ]
    likely = torch.cat([_scored_by_hand(demo_model, [window], 63) for window in windows])
    targets = torch.cat([window[1:] for window in windows])
    assert result.tokens == len(targets)
    nll = -likely[torch.arange(len(targets)), targets].mean()
    assert result.nll == pytest.approx(float(nll), rel=1e-5)
    assert warnings == [
        "documents of rows.jsonl that have no text (null or empty) and are skipped: 2"
    ]
    arguments = ["eval", str(demo_model), "--text", str(file), "--context", "64"]
    said = CliRunner().invoke(app, arguments).stderr
    assert said == f"warning: {warnings[0]}\n"


def test_short_and_unreadable_texts_are_refused(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Mia")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputModelError, match="less than one window"):
        evaluate_checkpoint(demo_model, tmp_path / "short.txt", context=64)
    for name in ("bytes.txt", "absent.txt"):
        with pytest.raises(UsageError, match="cannot read the text"):
            evaluate_checkpoint(demo_model, tmp_path / name, context=64)


def test_saved_measurements_reach_manifest_and_card(
    demo_model: Path, text: Path, tmp_path: Path
) -> None:
    out, runner = tmp_path / "mqa", CliRunner()
    convert(make_recipe({"method": "mqa", "source": str(demo_model), "output": str(out)}))
    arguments = ["eval", str(out), "--text", str(text), "--context", "64", "--samples", "2"]
    assert "Not measured yet" in (out / "README.md").read_text()
    for _ in range(2):  # the same measurement again replaces itself
        result = runner.invoke(app, [*arguments, "--against", str(demo_model), "--save", "-q"])
        assert result.exit_code == 0, result.stderr
    card = (out / "README.md").read_text()
    assert card.count("words.txt") == 1
    assert "Not measured yet" not in card
    verified = runner.invoke(app, ["verify", str(out), "--files-only", "-q"])
    assert verified.exit_code == 0, verified.stdout


def _save(out: Path, text: Path, *more: str) -> int:
    arguments = ["eval", str(out), "--text", str(text), "--context", "64", "--samples", "2"]
    return CliRunner().invoke(app, [*arguments, "--save", "-q", *more]).exit_code


def test_an_edited_card_is_never_replaced(
    demo_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mqa"
    convert(make_recipe({"method": "mqa", "source": str(demo_model), "output": str(out)}))
    card = out / "README.md"
    card.write_text(card.read_text() + "my notes\n")

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("it was measured, and would then be refused")

    monkeypatch.setattr("convert.loading.load_pair", measured)
    assert _save(out, text) == 7
    assert card.read_text().endswith("my notes\n")


def test_a_measurement_without_the_source_keeps_the_one_with_it(
    demo_model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mqa"
    convert(make_recipe({"method": "mqa", "source": str(demo_model), "output": str(out)}))
    assert _save(out, text, "--against", str(demo_model)) == 0
    assert _save(out, text) == 0
    assert (out / "README.md").read_text().count("words.txt") == 2


@pytest.mark.parametrize("device", ["foo", "cuda"])
def test_devices_that_are_not_there_are_refused(
    demo_model: Path, text: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=f"--device {device}"):
        evaluate_checkpoint(demo_model, text, device=device)


def test_logits_that_are_no_numbers_are_an_error(
    demo_model: Path, text: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(demo_model, tmp_path / "nan"))
    rewrite_tensors(folder, {"model.norm.weight": torch.full((128,), torch.nan).bfloat16()})
    with pytest.raises(VerificationError, match="NaN or infinite"):
        evaluate_checkpoint(folder, text, context=64, samples=1)


def test_logits_that_do_not_fit_into_memory_are_refused(
    demo_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the model itself fits; 8 windows of 64 tokens in a vocabulary of 512, three times in float32
    enough = 3 * 8 * 64 * 512 * 4
    monkeypatch.setattr("convert.loading.check_ram", lambda *_, **__: None)
    monkeypatch.setattr("convert.resources.available_ram", lambda: enough)
    evaluate_checkpoint(demo_model, text, context=64, samples=8, batch=8)
    monkeypatch.setattr("convert.resources.available_ram", lambda: enough - 1)
    with pytest.raises(ResourceError, match="8 windows of 64 tokens") as error:
        evaluate_checkpoint(demo_model, text, context=64, samples=8, batch=8)
    assert "--batch" in (error.value.hint or "")
    evaluate_checkpoint(demo_model, text, context=64, samples=8, batch=4)
