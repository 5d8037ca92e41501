"""Calls of the public ops that make them launch a given row of their tables.

The operands lie on the CPU and are never computed with: only their types, shapes and strides count,
and these are what a model would pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpatch.kernels.configs import Config
from kvpatch.kernels.reference import causal_span
from tests.kernels.measures import laid_out_as

# each is a kernel of its own to the compiler
FEATURES: Mapping[str, Mapping[str, float]] = {
    "plain": {},
    "softcap": {"softcap": 30.0},
    "narrow": {},
}
_FORMATS = {2: torch.bfloat16, 4: torch.float32}
_BATCH, _TOKENS, _KEYS = 2, 256, 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths and rows that a row of a table is to serve."""

    dtype: torch.dtype
    dim: int
    value_dim: int
    rope_dim: int
    rows: int

    @classmethod
    def of(cls, config: Config, feature: str) -> Sizes:
        """Those of the row, or with ``narrow`` the largest that fill no block."""
        widths = (config.dim, config.value_dim, config.rope_dim)
        if feature == "narrow":
            widths = tuple(width - 16 if width > 32 else width for width in widths)
        return cls(_FORMATS[config.dtype_bytes], *widths, config.rows)

    def tensor(self, heads: int, tokens: int, width: int) -> Tensor:
        """[B, heads, tokens, width], strided as a model has it: a token's heads together."""
        tensor = torch.zeros(_BATCH, heads, tokens, width, dtype=self.dtype)
        return laid_out_as(tensor, 0, 2, 1, 3)


def _flash(sizes: Sizes, features: Mapping[str, Any], *, backward: bool) -> None:
    from kvpatch.kernels import flash

    query = sizes.tensor(4, _TOKENS, sizes.dim)
    key, value = (sizes.tensor(2, _TOKENS, width) for width in (sizes.dim, sizes.value_dim))
    rope: dict[str, Tensor] = {}
    if sizes.rope_dim:
        rope["query_rope"] = sizes.tensor(4, _TOKENS, sizes.rope_dim)
        rope["key_rope"] = sizes.tensor(1, _TOKENS, sizes.rope_dim)
    for operand in (query, key, value, *rope.values()):
        operand.requires_grad_(backward)
    span = causal_span(_BATCH, _TOKENS, _TOKENS)
    output = flash.attention(query, key, value, span, scale=1.0, **rope, **features)
    if backward:
        output.backward(torch.zeros_like(output))


def _decode(sizes: Sizes, features: Mapping[str, Any]) -> None:
    from kvpatch.kernels import decode

    query = sizes.tensor(2 * sizes.rows, 1, sizes.dim)
    for keys in (_KEYS, 1):  # with splits, and without
        key, value = (
            torch.zeros(_BATCH, 2, keys, width, dtype=sizes.dtype)
            for width in (sizes.dim, sizes.value_dim)
        )
        decode.attention(query, key, value, causal_span(_BATCH, 1, keys), scale=1.0, **features)


def _latent_decode(sizes: Sizes, features: Mapping[str, Any]) -> None:
    from kvpatch.kernels import decode

    query, query_rope = (sizes.tensor(sizes.rows, 1, w) for w in (sizes.dim, sizes.rope_dim))
    for keys in (_KEYS, 1):
        latent, key_rope = (
            torch.zeros(_BATCH, 1, keys, width, dtype=sizes.dtype)
            for width in (sizes.dim, sizes.rope_dim)
        )
        span = causal_span(_BATCH, 1, keys)
        decode.latent_attention(query, query_rope, latent, key_rope, span, scale=1.0, **features)


@dataclass(frozen=True, slots=True)
class Launch:
    """How an op is made to take a row of its table.

    Args:
        call: Calls it.
        kernels: Names of the kernels that the row is for, and of what belongs to them.
    """

    call: Callable[[Sizes, Mapping[str, Any]], None]
    kernels: tuple[str, ...]


LAUNCHES: Mapping[str, Launch] = {
    "flash_forward": Launch(partial(_flash, backward=False), ("flash_forward",)),
    "flash_backward_queries": Launch(partial(_flash, backward=True), ("flash_backward_queries",)),
    "flash_backward_keys": Launch(partial(_flash, backward=True), ("flash_backward_keys",)),
    "decode": Launch(_decode, ("split_kernel", "merge_kernel")),
    "latent_decode": Launch(_latent_decode, ("split_kernel", "merge_kernel")),
}
