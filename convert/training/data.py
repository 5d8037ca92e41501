"""Text as packed sequences of tokens, in an order that depends on the seed alone.

Documents follow one another without padding; positions begin anew with each of them, which is how
models know that they are separate. Every process sees the same stream and takes its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from convert.documents import is_plain, open_text, read_documents, row_text, skipped_documents
from convert.tokens import TextTokens
from kvpatch.errors import InputModelError, UsageError

__all__ = ["IGNORED", "Batch", "Encoder", "Piece", "Sequences", "check_text", "pieces_of", "stack"]

IGNORED = -100  # no target
_PIECE = 1 << 16  # characters of a long text that are tokenised at a time
# what is shuffled among itself, since neighbours in a text are of one subject: tokens, and at least
# so many sequences
_BLOCK_TOKENS, _BLOCK = 1 << 20, 256


class Piece(NamedTuple):
    """Part of a document, and whether it begins and ends it; "" is a document without text."""

    text: str
    first: bool = True
    last: bool = True


class Batch(NamedTuple):
    """Sequences for one forward pass, each [B, T]; targets are next tokens or ``IGNORED``."""

    tokens: Tensor
    positions: Tensor
    targets: Tensor


def pieces_of(data: str) -> Callable[[], Iterator[Piece]]:
    """What reads a text from its beginning.

    Args:
        data: The recipe's key: a file, or ``hub:NAME[:CONFIG][@SPLIT]``.

    Raises:
        UsageError: If it cannot be read; also from what is returned.
    """
    if data.startswith("hub:"):
        return lambda: _streamed(data.removeprefix("hub:"))
    path = Path(data)
    if is_plain(path):
        return lambda: _long_text(path)
    return lambda: map(Piece, read_documents(path))


def check_text(data: str) -> None:
    """Refuse a file that is no text by its first document, before any work.

    Args:
        data: As of ``pieces_of``; a data set on the Hub is left there.

    Raises:
        UsageError: If it cannot be read.
        InputModelError: If it is empty.
    """
    if not data.startswith("hub:") and next(pieces_of(data)(), None) is None:
        raise InputModelError(f"{data} is empty")


def _long_text(path: Path) -> Iterator[Piece]:
    """A text file of any length is one document; it is cut after lines."""
    with open_text(path) as stream:
        first, lines = True, "".join(stream.readlines(_PIECE))
        while lines:
            following = "".join(stream.readlines(_PIECE))
            yield Piece(lines, first, not following)
            first, lines = False, following


def _streamed(name: str) -> Iterator[Piece]:
    try:
        from datasets import load_dataset  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"hub:{name}: streaming data sets needs the package datasets",
            hint="pip install 'kvpatch[train]'",
        ) from error
    plain, _, split = name.partition("@")
    path, _, config = plain.partition(":")
    rows = load_dataset(path, config or None, split=split or "train", streaming=True)
    for number, row in enumerate(rows, 1):
        yield Piece(row_text(row, f"hub:{name}, row {number}"))


@dataclass(frozen=True, slots=True)
class Encoder:
    """Tokens of documents, with what a tokenizer puts before and after one.

    Args:
        tokens: Of texts.
    """

    tokens: TextTokens

    def __call__(self, piece: Piece) -> list[int]:
        """Token ids of a piece.

        Raises:
            InputModelError: If the model has no row for one.
        """
        before = self.tokens.opening if piece.first else []
        after = self.tokens.end if piece.last else []
        return [*before, *self.tokens(piece.text), *after]


class Sequences:
    """An endless stream of sequences; begins the text anew when it ends.

    Args:
        pieces: Reads the text from its beginning.
        encode: Makes tokens of a piece.
        context: Tokens of a sequence.
        seed: Order within blocks of a million tokens or 256 sequences, if that is more, and within
            an epoch; None leaves them in the order of the text.
        packed: Sequences hold several documents; else one each, padded with token 0.
        what: Name of the text, for messages.
    """

    def __init__(
        self,
        pieces: Callable[[], Iterator[Piece]],
        encode: Callable[[Piece], list[int]],
        *,
        context: int,
        seed: int | None,
        packed: bool,
        what: str = "the text",
    ) -> None:
        self._pieces, self._encode, self._what = pieces, encode, what
        self._context, self._seed, self._packed = context, seed, packed
        self._open: Iterator[Piece] | None = None
        self._at = _beginning()
        self._block: list[Batch] = []
        self._start = dict(self._at)
        self._taken = 0

    def take(self, count: int) -> list[Batch]:
        """The next sequences, each a batch of one.

        Raises:
            InputModelError: If the text has not a single sequence.
        """
        taken: list[Batch] = []
        while len(taken) < count:
            if self._taken == len(self._block):
                self._fill()
            part = self._block[self._taken : self._taken + count - len(taken)]
            self._taken += len(part)
            taken += part
        return taken

    @property
    def warnings(self) -> list[str]:
        """What should be said of the documents that were read."""
        return skipped_documents(self._what, self._at["skipped"])

    def state(self) -> dict[str, Any]:
        """Where the stream is: plain data, less than a sequence and a few numbers."""
        return {**self._start, "taken": self._taken}

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where a stream of the same text was; its last block is read again."""
        self._at = _beginning() | {key: value for key, value in state.items() if key != "taken"}
        self._at |= {key: list(state[key]) for key in ("ids", "begins")}
        self._open = None
        self._block, self._taken = [], 0
        if state["taken"]:
            self._fill()
            self._taken = state["taken"]
        return self

    def whole(self, most: int) -> list[Batch]:
        """The first sequences of the text in its order, without beginning it anew.

        Raises:
            InputModelError: If there is none.
        """
        found: list[Batch] = []
        while len(found) < most:
            cut = self._cut()
            if cut is not None:
                found.append(cut)
            elif not self._read():
                break
        if not found:
            raise InputModelError(
                f"{self._what} has not one sequence of {self._context} tokens",
                hint="Give more text, or a smaller --context.",
            )
        return found

    def _fill(self) -> None:
        self._start = {**self._at, "ids": list(self._at["ids"]), "begins": list(self._at["begins"])}
        block: list[Batch] = []
        most = max(_BLOCK, _BLOCK_TOKENS // self._context)
        while len(block) < most:
            cut = self._cut()
            if cut is not None:
                block.append(cut)
            elif not self._read():
                if block:
                    break
                self._check_progress()
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._at["block"])
            block = [block[i] for i in torch.randperm(len(block), generator=generator).tolist()]
        self._at["block"] += 1
        self._block, self._taken = block, 0

    def _check_progress(self) -> None:
        """Refuse a text that was read to its end without a token, or often without a sequence."""
        if not self._at["ids"] or self._at["epoch"] > self._context:
            raise InputModelError(f"{self._what} has no tokens to train on")

    def _read(self) -> bool:
        """Append the tokens of the next piece; False at the end of the text."""
        if self._open is None:
            self._open = islice(self._pieces(), self._at["piece"], None)
        piece = next(self._open, None)
        if piece is None:
            self._open = None
            self._at |= {"epoch": self._at["epoch"] + 1, "piece": 0}
            return False
        self._at["piece"] += 1
        if not piece.text:
            self._at["skipped"] += self._at["epoch"] == 0
            return True
        ids = self._encode(piece)
        self._at["ids"] += ids
        self._at["begins"] += [int(piece.first and not index) for index in range(len(ids))]
        return True

    def _cut(self) -> Batch | None:
        """Take a sequence off the tokens at hand, if there are enough."""
        ids, begins = self._at["ids"], self._at["begins"]
        length = self._context
        if not self._packed:
            later = next((i for i in range(1, len(ids)) if begins[i]), None)
            length = min(length, later) if later is not None else length
        if len(ids) < length or not ids:
            return None
        sequence = _sequence(ids[:length], begins[:length], self._context)
        del ids[:length], begins[:length]
        return sequence


def _beginning() -> dict[str, Any]:
    """Where a stream is before anything was read; ``skipped`` counts in the first epoch alone."""
    return {"epoch": 0, "piece": 0, "block": 0, "skipped": 0, "ids": [], "begins": []}


def _sequence(ids: list[int], begins: list[int], context: int) -> Batch:
    """One sequence [1, T], padded to its length."""
    length = len(ids)
    tokens = torch.zeros(1, context, dtype=torch.long)
    tokens[0, :length] = torch.tensor(ids)
    starts = torch.zeros(context, dtype=torch.long)
    starts[:length] = torch.tensor(begins)
    starts[0] = 1
    places = torch.arange(context)
    positions = places - torch.where(starts == 1, places, 0).cummax(0).values
    targets = torch.full((1, context), IGNORED)
    targets[0, : length - 1] = tokens[0, 1:length]
    targets[0, :-1].masked_fill_(starts[1:] == 1, IGNORED)
    return Batch(tokens, positions[None], targets)


def stack(sequences: list[Batch]) -> Batch:
    """One batch of several."""
    return Batch(*(torch.cat(parts) for parts in zip(*sequences, strict=True)))
