"""Texts to calibrate and measure on: files of several formats, and windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convert.checkpoint.paths import hub_dataset
from convert.loading import load_tokenizer, quiet_transformers
from kvpatch.errors import InputModelError, UsageError

__all__ = ["Text", "Windows", "few_tokens", "read_documents", "read_text", "windows_from"]

# more text than any calibration wants; the rest of a larger file is not read
_MOST_CHARACTERS = 32_000_000
_COLUMN = "text"
# measured, GQA to a quarter of the heads: with 2 refits lose, with 4 they win on prose; on few
# made-up sentences they lose with 8 and win with 16
_TOKENS_PER_DIM = 8


@dataclass(frozen=True, slots=True)
class Text:
    """A whole text to measure on.

    Args:
        name: File name.
        sha256: Hash of the file.
        content: Its characters.
    """

    name: str
    sha256: str
    content: str


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of a text.

    Args:
        tokens: [N, T] token ids.
        text: File name.
        text_sha256: Hash of the file.
        tokens_sha256: Hash of the token ids.
        dataset: The dataset on the Hub that the file is of, where that is known.
    """

    tokens: Tensor
    text: str
    text_sha256: str
    tokens_sha256: str
    dataset: str | None = None


def read_text(path: Path) -> Text:
    """The text of a UTF-8 file.

    Raises:
        UsageError: If the file cannot be read.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Text(path.name, digest, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {path}: {error}") from error


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a text file, or of the column ``text`` of a jsonl or parquet file.

    Raises:
        UsageError: If the file cannot be read, or has no such column.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix in {".jsonl", ".ndjson"}:
            yield from _json_lines(path)
        else:
            with path.open(encoding="utf-8") as stream:
                yield stream.read(_MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {path}: {error}") from error


def windows_from(folder: Path, path: Path, *, samples: int, context: int, seed: int) -> Windows:
    """Random windows of a text in the tokens of a model.

    Args:
        folder: Checkpoint folder with the tokenizer.
        path: Text, jsonl or parquet file.
        samples: Number of windows.
        context: Tokens of a window, the tokenizer's opening token included.
        seed: Chooses the windows.

    Raises:
        UsageError: If the file cannot be read.
        InputModelError: If the text has too few tokens.
    """
    documents = list(_limited(read_documents(path)))
    with quiet_transformers():
        tokenizer = load_tokenizer(folder)
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
        opening = tokenizer("")["input_ids"][:1]
    ids = torch.tensor([token for document in encoded for token in document], dtype=torch.long)
    body = context - len(opening)
    cut = ids[: len(ids) // body * body].view(-1, body)
    if len(cut) < samples:
        raise InputModelError(
            f"{path} has {len(ids):,} tokens, fewer than {samples} windows of {context}",
            hint="Give more text, or smaller --samples or --context.",
        )
    chosen = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))[:samples]
    start = torch.tensor(opening, dtype=torch.long).expand(samples, -1)
    tokens = torch.cat([start, cut[chosen.sort().values]], 1)
    with path.open("rb") as stream:
        text_hash = hashlib.file_digest(stream, "sha256").hexdigest()
    token_hash = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Windows(tokens, path.name, text_hash, token_hash, hub_dataset(path))


def _limited(documents: Iterator[str]) -> Iterator[str]:
    left = _MOST_CHARACTERS
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield str(json.loads(line)[_COLUMN])
                except (ValueError, KeyError, TypeError) as error:
                    raise UsageError(
                        f'{path}:{number}: expected an object with a key "{_COLUMN}"'
                    ) from error


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow", hint="pip install 'kvpatch[parquet]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UsageError(f"cannot read the text {path}: {error}") from error
    if _COLUMN not in file.schema_arrow.names:
        raise UsageError(f'{path} has no column "{_COLUMN}": {", ".join(file.schema_arrow.names)}')
    for batch in file.iter_batches(columns=[_COLUMN], batch_size=256):
        yield from (str(value) for value in batch.column(0).to_pylist() if value)


def few_tokens(windows: Windows, hidden: int) -> list[str]:
    """A warning if windows have too few tokens for what is fitted to them.

    Args:
        windows: Of the calibration.
        hidden: Hidden width E of the model.
    """
    (count, context), wanted = windows.tokens.shape, _TOKENS_PER_DIM * hidden
    if count * context >= wanted:
        return []
    samples = -(-wanted // context)
    few = (
        f"{count * context:,} calibration tokens are few for {hidden:,} input dims: with less than "
        f"{wanted:,} a refit can lose more than it wins; give --samples {samples} or --refit none"
    )
    return [few]
