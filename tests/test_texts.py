"""Windows of texts in the tokens of a model are what they should be."""

from __future__ import annotations

import json
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.loading import load_tokenizer
from convert.texts import read_text, windows_from
from kvpatch.errors import InputModelError
from tests.families.texts import token_ids, write_tokenizer

MODEL = Path(str(resources.files("convert").joinpath("assets/demo-model")))
ROWS = 512


def test_windows_are_pieces_of_the_text_behind_the_opening_token(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(400)))
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    windows = windows_from(MODEL, text, rows=ROWS, samples=5, context=16, seed=0)
    pieces = {tuple(ids[start : start + 15]) for start in range(0, len(ids) - 14, 15)}
    assert windows.tokens.shape == (5, 16)
    assert set(windows.tokens[:, 0].tolist()) == {tokenizer.bos_token_id}
    chosen = {tuple(window) for window in windows.tokens[:, 1:].tolist()}
    assert len(chosen) == 5
    assert chosen <= pieces
    again = windows_from(MODEL, text, rows=ROWS, samples=5, context=16, seed=0)
    other = windows_from(MODEL, text, rows=ROWS, samples=5, context=16, seed=1)
    assert torch.equal(windows.tokens, again.tokens)
    assert windows.tokens_sha256 == again.tokens_sha256 != other.tokens_sha256


@pytest.mark.parametrize(
    ("special", "between"),
    [({"eos_token": "<eos>", "bos_token": "<bos>"}, [2]), ({"bos_token": "<bos>"}, [1]), ({}, [])],
    ids=["end", "beginning", "nothing"],
)
def test_documents_are_joined_by_the_separator(
    tmp_path: Path, special: dict[str, str], between: list[int]
) -> None:
    write_tokenizer(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | special))
    documents = ["one", None, "twofish", "", "redfish"]
    text = tmp_path / "a.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    parts = [token_ids(document).tolist() for document in documents if document]
    joined = [*chain.from_iterable([*part, *between] for part in parts[:-1]), *parts[-1]]
    count = len(joined) // 4
    windows = windows_from(tmp_path, text, rows=97, samples=count, context=4, seed=0)
    assert windows.tokens.flatten().tolist() == joined[: 4 * count]
    assert windows.warnings == [
        "documents of a.jsonl that have no text (null or empty) and are skipped: 2"
    ]
    with pytest.raises(InputModelError, match=f"has {len(joined)} tokens") as caught:
        windows_from(tmp_path, text, rows=97, samples=99, context=4, seed=0)
    assert windows.warnings[0] in (caught.value.hint or "")


def test_a_text_file_is_one_document_without_warnings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    text = read_text(tmp_path / "a.txt")
    assert (text.documents, text.warnings) == (["one\n\ntwo"], [])


@pytest.mark.parametrize("special", [False, True], ids=["text", "separator"])
def test_tokens_without_a_row_are_refused(tmp_path: Path, special: bool) -> None:
    """In the text, or those that the tokenizer puts between documents."""
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens(["<tool>"])
    if special:
        tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path)
    text, name = tmp_path / "a.jsonl", "<end>" if special else "<tool>"
    documents = ["a" * 20, "b" * 20 if special else "bb<tool>" + "b" * 20]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    past = 98 if special else 97
    how: dict[str, Any] = {"samples": 2, "context": 4, "seed": 0}
    said = f"{text} has the token '{name}' with the id {past}, but .* has {past} rows"
    with pytest.raises(InputModelError, match=said):
        windows_from(tmp_path, text, rows=past, **how)
    assert len(windows_from(tmp_path, text, rows=past + 1, **how).tokens) == 2
    text.write_text(json.dumps({"text": "a" * 20}))  # the token is there, and no text uses it
    assert len(windows_from(tmp_path, text, rows=97, **how).tokens) == 2


def test_a_calibration_reads_no_more_than_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("abcdefgh")
    monkeypatch.setattr("convert.texts._MOST_CHARACTERS", 5)
    with pytest.raises(InputModelError, match="has 5 tokens"):
        windows_from(tmp_path, tmp_path / "a.txt", rows=97, samples=9, context=4, seed=0)
    assert read_text(tmp_path / "a.txt").documents == ["abcdefgh"]


def test_a_text_with_too_few_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one fish two fish")
    with pytest.raises(InputModelError, match="fewer than 9 windows of 16"):
        windows_from(MODEL, path, rows=ROWS, samples=9, context=16, seed=0)
