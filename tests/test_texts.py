"""Calibration texts: every format gives the same documents, and windows are what they should be."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from convert.loading import load_tokenizer
from convert.texts import read_documents, windows_from
from kvpatch.errors import InputModelError, UsageError

DOCUMENTS = ["one fish", "two\nfish", "réd fish"]
MODEL = Path(str(resources.files("convert").joinpath("assets/demo-model")))


def _write(folder: Path, kind: str) -> Path:
    path = folder / f"text.{kind}"
    if kind == "parquet":
        table = pyarrow.table({"id": [1, 2, 3], "text": DOCUMENTS})
        parquet.write_table(table, path, row_group_size=2)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS) + "\n\n")
    else:
        path.write_text("".join(DOCUMENTS))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_columns_are_read_document_by_document(tmp_path: Path, kind: str) -> None:
    assert list(read_documents(_write(tmp_path, kind))) == DOCUMENTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert list(read_documents(_write(tmp_path, "txt"))) == ["".join(DOCUMENTS)]


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": DOCUMENTS}), tmp_path / "text.parquet")
    with pytest.raises(UsageError, match='no column "text": body'):
        list(read_documents(tmp_path / "text.parquet"))


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UsageError, match="cannot read the text"):
        list(read_documents(tmp_path / "text.parquet"))


def test_windows_are_pieces_of_the_text_behind_the_opening_token(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(400)))
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    windows = windows_from(MODEL, text, samples=5, context=16, seed=0)
    pieces = {tuple(ids[start : start + 15]) for start in range(0, len(ids) - 14, 15)}
    assert windows.tokens.shape == (5, 16)
    assert set(windows.tokens[:, 0].tolist()) == {tokenizer.bos_token_id}
    chosen = {tuple(window) for window in windows.tokens[:, 1:].tolist()}
    assert len(chosen) == 5
    assert chosen <= pieces
    again = windows_from(MODEL, text, samples=5, context=16, seed=0)
    other = windows_from(MODEL, text, samples=5, context=16, seed=1)
    assert torch.equal(windows.tokens, again.tokens)
    assert windows.tokens_sha256 == again.tokens_sha256 != other.tokens_sha256


def test_a_text_with_too_few_tokens_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "txt")
    with pytest.raises(InputModelError, match="fewer than 9 windows of 16"):
        windows_from(MODEL, path, samples=9, context=16, seed=0)
