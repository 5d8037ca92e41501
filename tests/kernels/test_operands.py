"""Operands that do not fit are refused: a kernel would read beyond the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpatch.errors import UsageError
from kvpatch.kernels import decode, flash
from kvpatch.kernels.reference import causal_span

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM, ROPE = 2, 4, 2, 3, 20, 32, 16


def operands(kv_heads: int = KV_HEADS) -> dict[str, Tensor]:
    """Operands of the flash op that fit one another."""
    return {
        "query": torch.zeros(BATCH, HEADS, QUERIES, DIM),
        "key": torch.zeros(BATCH, kv_heads, KEYS, DIM),
        "value": torch.zeros(BATCH, kv_heads, KEYS, DIM),
        "span": causal_span(BATCH, QUERIES, KEYS),
    }


def latents() -> dict[str, Tensor]:
    """Operands of latent attention that fit one another."""
    return {
        "query": torch.zeros(BATCH, HEADS, QUERIES, DIM),
        "query_rope": torch.zeros(BATCH, HEADS, QUERIES, ROPE),
        "latent": torch.zeros(BATCH, 1, KEYS, DIM),
        "key_rope": torch.zeros(BATCH, 1, KEYS, ROPE),
        "span": causal_span(BATCH, QUERIES, KEYS),
        "key_scale": torch.zeros(BATCH, KV_HEADS, KEYS),
    }


OPS: Mapping[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Tensor]]]] = {
    "flash": (flash.attention, operands),
    "decode": (decode.attention, operands),
    "latent": (decode.latent_attention, latents),
}
SHARED: Mapping[str, tuple[Tensor | float, str]] = {
    "key": (torch.zeros(BATCH, KV_HEADS, KEYS, DIM + 1), r"key is .* \[2, 2, 20, 32\] was"),
    "value": (torch.zeros(BATCH, KV_HEADS, KEYS - 1, DIM), r"value is .* \[2, 2, 20, 32\] was"),
    "span": (causal_span(BATCH, QUERIES + 1, KEYS), r"span is .*int32 \[2, 3, 2\] was"),
    "slopes": (torch.zeros(HEADS - 1), r"slopes is .* \[4\] was"),
    "scale": (0.0, "scale 0.0 and softcap None must be greater than 0"),
    "softcap": (-1.0, "softcap -1.0 must be greater"),
}
ROTARY: Mapping[str, tuple[Tensor | None, str]] = {
    "query_rope": (torch.zeros(BATCH, 1, QUERIES, ROPE), r"query_rope is .* \[2, 4, 3, 16\] was"),
    "key_rope": (torch.zeros(BATCH, KV_HEADS, KEYS, ROPE), r"key_rope is .* \[2, 1, 20, 16\] was"),
}
SCALED: Mapping[str, tuple[Tensor, str]] = {
    "latent": (torch.zeros(BATCH, 1, KEYS, DIM - 16), r"key is .* \[2, 1, 20, 32\] was"),
    "key_scale": (torch.zeros(BATCH, 3, KEYS), "4 query heads cannot share 3 key scales"),
}


def call(op: str, **changed: Any) -> Tensor:
    compute, fitting = OPS[op]
    return compute(**{"scale": 1.0, **fitting(), **changed})


@pytest.mark.parametrize(
    ("op", "name", "given", "message"),
    [
        *((op, name, *case) for op in ("flash", "decode") for name, case in SHARED.items()),
        *(("latent", name, *case) for name, case in (ROTARY | SCALED).items()),
        ("latent", "span", *SHARED["span"]),
        ("flash", "key", torch.zeros(BATCH, KV_HEADS, KEYS, DIM).half(), "float16 .*float32"),
        ("decode", "span", causal_span(BATCH, QUERIES, KEYS).long(), "int64 .*int32"),
    ],
)
def test_what_does_not_fit_is_named(op: str, name: str, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(op, **{name: given})


@pytest.mark.parametrize("op", ["flash", "decode"])
def test_heads_are_shared_evenly(op: str) -> None:
    with pytest.raises(UsageError, match="4 query heads cannot share 3 key heads evenly"):
        call(op, **operands(kv_heads=3))


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_parts_come_together(name: str) -> None:
    with pytest.raises(UsageError, match="query_rope and key_rope come together"):
        call("flash", **{name: latents()[name]})


def test_slopes_have_no_gradient() -> None:
    with pytest.raises(UsageError, match="slopes have no gradient"):
        call("flash", slopes=torch.zeros(HEADS, requires_grad=True))
