"""A tokenizer of single characters for the tiny models, and random texts in it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

__all__ = ["random_text", "token_ids", "write_tokenizer"]

_SPECIAL = ("<pad>", "<bos>", "<eos>")
# printable ASCII without the space, which every tokenizer class leaves as it is
_CHARACTERS = [chr(code) for code in range(33, 127)]


def write_tokenizer(folder: Path) -> None:
    """Give a checkpoint with at least 97 tokens a tokenizer."""
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), pad_token="<pad>"
    ).save_pretrained(folder)


def random_text(tokens: int, *, seed: int) -> str:
    """So many random characters, each of which is a token."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(_CHARACTERS), (tokens,), generator=generator)
    return "".join(_CHARACTERS[index] for index in chosen.tolist())


def token_ids(text: str) -> Tensor:
    """Token ids of a text, [T]."""
    return torch.tensor([len(_SPECIAL) + _CHARACTERS.index(character) for character in text])
