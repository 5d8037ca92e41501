"""Attention problems of every kind that ``flash`` is for, small, and their truth in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpatch.kernels import reference
from kvpatch.kernels.reference import causal_span

Spans = Callable[[int, int, int], Tensor]


def causal(batch: int, queries: int, keys: int) -> Tensor:
    return causal_span(batch, queries, keys)


def window(batch: int, queries: int, keys: int) -> Tensor:
    return causal_span(batch, queries, keys, window=19)


def wide_window(batch: int, queries: int, keys: int) -> Tensor:
    """So wide that all queries of a tile see some tiles of keys wholly, and none reaches back."""
    return causal_span(batch, queries, keys, window=60)


def everything(batch: int, queries: int, keys: int) -> Tensor:
    return torch.tensor([0, keys], dtype=torch.int32).expand(batch, queries, 2)


def left_padded(batch: int, queries: int, keys: int) -> Tensor:
    """Each sequence begins later than the one before; what stands before sees nothing."""
    span = causal_span(batch, queries, keys).clone()
    for entry in range(batch):
        span[entry, :, 0] = 21 * entry
    return span


def right_padded(batch: int, queries: int, keys: int) -> Tensor:
    """Each sequence ends earlier than the one before; what stands behind sees nothing."""
    span = causal_span(batch, queries, keys).clone()
    for entry in range(batch):
        length = keys - 17 * entry
        span[entry, queries - 17 * entry :] = length
    return span


def packed(batch: int, queries: int, keys: int) -> Tensor:
    """Documents one after the other, at other places in each sequence."""
    span = causal_span(batch, queries, keys).clone()
    for entry in range(batch):
        for border in (9 + entry, 33 + 5 * entry, 34 + 5 * entry):
            after = span[entry, :, 1] > border
            span[entry, after, 0] = border
    return span


@dataclass(frozen=True, slots=True)
class Case:
    """A problem; letters are those of the shapes."""

    spans: Spans = causal
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    queries: int = 53
    keys: int = 53
    dim: int = 32
    value_dim: int = 32
    rope_dim: int = 0
    softcap: float | None = None
    alibi: bool = False


CASES = {
    "mha": Case(kv_heads=2),
    "gqa": Case(batch=2, heads=4, kv_heads=2, queries=37, keys=37),
    "mqa": Case(heads=3),
    "everything": Case(spans=everything, queries=21, keys=70),
    "left_padded": Case(spans=left_padded, batch=3, heads=1),
    "right_padded": Case(spans=right_padded, batch=2, heads=1),
    "packed": Case(spans=packed, batch=2, heads=1),
    "window": Case(spans=window, queries=70, keys=70),
    "window_of_chunk": Case(spans=wide_window, queries=20, keys=120),
    "softcap": Case(softcap=1.2),
    "alibi": Case(alibi=True, heads=3),
    "chunk": Case(queries=19, keys=70),
    "one_query": Case(queries=1, keys=40),
    "latent": Case(heads=2, kv_heads=2, dim=48, value_dim=32, rope_dim=16),
    "latent_of_groups": Case(heads=4, kv_heads=2, queries=33, keys=40, rope_dim=24, value_dim=16),
    "dim_80": Case(heads=1, dim=80, value_dim=80, queries=35, keys=35),
    "dim_96": Case(heads=1, dim=96, value_dim=64, queries=35, keys=35),
    "all_at_once": Case(
        spans=packed, batch=2, heads=4, kv_heads=2, queries=45, keys=52, dim=40, value_dim=24,
        rope_dim=16, softcap=2.0, alibi=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Operands of a case, drawn in a number format, with the truth of it.

    Args:
        operands: Query, key, value and the two rotary parts, if any, by name.
        options: All else that ``attention`` takes.
        grad: Of the output.
    """

    operands: dict[str, Tensor]
    options: dict[str, Any]
    grad: Tensor

    def reference(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Output, log-sums and gradients of the operands, in float64."""
        operands = {name: t.double().requires_grad_() for name, t in self.operands.items()}
        output, total = reference.attention(**operands, **self.options)
        grads = torch.autograd.grad(output, list(operands.values()), self.grad.double())
        return output.detach(), total.detach(), dict(zip(operands, grads, strict=True))

    def renewed(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same with each operand and the gradient changed, in layout for example."""
        operands = {name: change(tensor) for name, tensor in self.operands.items()}
        return Problem(operands, self.options, change(self.grad))


def problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Random operands of a case."""
    draw = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    def operands() -> Iterator[tuple[str, Tensor]]:
        of_queries = (case.batch, case.heads, case.queries)
        yield "query", random(*of_queries, case.dim)
        yield "key", random(case.batch, case.kv_heads, case.keys, case.dim)
        yield "value", random(case.batch, case.kv_heads, case.keys, case.value_dim)
        if case.rope_dim:
            yield "query_rope", random(*of_queries, case.rope_dim)
            yield "key_rope", random(case.batch, 1, case.keys, case.rope_dim)

    slopes = torch.linspace(0.02, 0.3, case.heads, device=device) if case.alibi else None
    return Problem(
        dict(operands()),
        {
            "span": case.spans(case.batch, case.queries, case.keys).to(device),
            "scale": (case.dim + case.rope_dim) ** -0.5,
            "softcap": case.softcap,
            "slopes": slopes,
        },
        random(case.batch, case.queries, case.heads, case.value_dim),
    )
