"""Texts to calibrate and measure on, and windows of their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convert.checkpoint.paths import hub_dataset
from convert.documents import read_documents, skipped_documents
from convert.loading import load_tokenizer, quiet_transformers
from convert.tokens import TextTokens
from kvpatch.errors import InputModelError

__all__ = ["Text", "Windows", "few_tokens", "read_text", "windows_from"]

# more text than any calibration wants; the rest of a larger file is not read
_MOST_CHARACTERS = 32_000_000
# measured, GQA to a quarter of the heads: with 2 refits lose, with 4 they win on prose; on few
# made-up sentences they lose with 8 and win with 16
_TOKENS_PER_DIM = 8


@dataclass(frozen=True, slots=True)
class Text:
    """A whole text to measure on.

    Args:
        name: File name.
        sha256: Hash of the file.
        documents: What it holds.
        warnings: What should be said of it.
    """

    name: str
    sha256: str
    documents: Sequence[str]
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of a text.

    Args:
        tokens: [N, T] token ids.
        text: File name.
        text_sha256: Hash of the file.
        tokens_sha256: Hash of the token ids.
        dataset: The dataset on the Hub that the file is of, where that is known.
        warnings: What should be said of the text.
    """

    tokens: Tensor
    text: str
    text_sha256: str
    tokens_sha256: str
    dataset: str | None = None
    warnings: Sequence[str] = ()


def read_text(path: Path) -> Text:
    """The text of a file, read as ``read_documents`` does.

    Raises:
        UsageError: If the file cannot be read.
    """
    read = list(read_documents(path))
    return Text(path.name, _sha256(path), *_with_text(path.name, read))


def windows_from(
    folder: Path, path: Path, *, rows: int, samples: int, context: int, seed: int
) -> Windows:
    """Random windows of a text in the tokens of a model.

    Args:
        folder: Checkpoint folder with the tokenizer.
        path: Text, json, jsonl or parquet file.
        rows: Of the model's embedding table.
        samples: Number of windows.
        context: Tokens of a window, the tokenizer's opening token included.
        seed: Chooses the windows.

    Raises:
        UsageError: If the file cannot be read.
        InputModelError: If there is no tokenizer, or the text has too few tokens, or some that the
            model has no row for.
    """
    read = list(read_documents(path, most=_MOST_CHARACTERS))
    documents, warnings = _with_text(path.name, read)
    with quiet_transformers():
        encode = TextTokens(load_tokenizer(folder), rows, str(path))
        opening = encode.opening
        ids = torch.tensor(encode.joined(documents), dtype=torch.long)
    body = context - len(opening)
    cut = ids[: len(ids) // body * body].view(-1, body)
    if len(cut) < samples:
        advice = ["Give more text, or smaller --samples or --context.", *warnings]
        raise InputModelError(
            f"{path} has {len(ids):,} tokens, fewer than {samples} windows of {context}",
            hint=" ".join(advice),
        )
    chosen = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))[:samples]
    start = torch.tensor(opening, dtype=torch.long).expand(samples, -1)
    tokens = torch.cat([start, cut[chosen.sort().values]], 1)
    token_hash = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Windows(tokens, path.name, _sha256(path), token_hash, hub_dataset(path), warnings)


def _with_text(name: str, documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """The documents that have text, and what to say of the others."""
    found = [document for document in documents if document]
    return found, skipped_documents(name, len(documents) - len(found))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
