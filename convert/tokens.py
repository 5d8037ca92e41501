"""Texts in the tokens of a model, which must have a row in its embedding table for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvpatch.errors import InputModelError

__all__ = ["TextTokens", "check_token_ids", "embedding_rows"]


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Makes tokens of texts.

    Args:
        tokenizer: Of transformers.
        rows: Of the embedding table of the model; the shortest, if there are several models.
        what: Name of the text, for messages.
    """

    tokenizer: Any
    rows: int
    what: str

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text, without those that a tokenizer puts around it.

        Raises:
            InputModelError: If the model has no row for one.
        """
        return self._checked(
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        )

    def joined(self, documents: Iterable[str]) -> list[int]:
        """Token ids of documents, with the separator between them.

        Raises:
            InputModelError: If the model has no row for one.
        """
        ids: list[int] = []
        for number, document in enumerate(documents):
            ids += (self.separator if number else []) + self(document)
        return ids

    @property
    def opening(self) -> list[int]:
        """The token that the tokenizer puts before a text, if any."""
        return self._checked(self.tokenizer("")["input_ids"][:1])

    @property
    def end(self) -> list[int]:
        """The token that ends a document, if any."""
        end = self.tokenizer.eos_token_id
        return self._checked([] if end is None else [end])

    @property
    def separator(self) -> list[int]:
        """The token between documents: that which ends one, or else begins one, if any."""
        begin = self.tokenizer.bos_token_id
        return self.end or self._checked([] if begin is None else [begin])

    def _checked(self, ids: list[int]) -> list[int]:
        check_token_ids(ids, self.tokenizer, self.rows, what=self.what)
        return ids


def check_token_ids(ids: Sequence[int], tokenizer: Any, rows: int, *, what: str) -> None:
    """Refuse token ids past an embedding table.

    Args:
        ids: Of a text.
        tokenizer: Of transformers.
        rows: Of the embedding table.
        what: Name of the text, for messages.

    Raises:
        InputModelError: If there are any.
    """
    if max(ids, default=-1) < rows:
        return
    past = next(token for token in ids if token >= rows)
    raise InputModelError(
        f"{what} has the token {tokenizer.convert_ids_to_tokens(past)!r} with the id {past}, "
        f"but the embedding table of the model has {rows:,} rows",
        hint="The tokenizer was given tokens that the model was not: take the tokenizer that it "
        "was trained with, or a text without such tokens.",
    )


def embedding_rows(*models: Any | None) -> int:
    """Rows of the embedding tables of loaded models, of the shortest; None is no model."""
    tables = (model.get_input_embeddings() for model in models if model is not None)
    return min(int(table.weight.shape[0]) for table in tables)
