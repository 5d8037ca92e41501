"""Attention to all keys from attention to each share of them."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merge_kernel"]


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partial, total, output, splits,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean of the outputs of the splits of a row, by their sums; grid: rows x blocks of columns.

    Args:
        partial: float32 [rows, splits, Dv], undefined where ``total`` is minus infinity.
        total: float32 [rows, splits], logarithms to base 2 of the sums of exponentials.
        output: [rows, Dv], 0 where all sums are.
        splits: Shares of the keys.
        VALUE_DIM: Dv.
        BLOCK_V: Columns of a program.
        BLOCK_SPLITS: That are read at once.
        MOST_SPLITS: A power of two that is no less than ``splits``.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    partial += row * splits * VALUE_DIM
    total += row * splits
    every = tl.arange(0, MOST_SPLITS)
    peak = tl.max(tl.load(total + every, mask=every < splits, other=-float("inf")))
    pivot = tl.where(peak == -float("inf"), 0.0, peak)

    weight = tl.zeros((BLOCK_SPLITS,), tl.float32)
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    for first in tl.range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        share = tl.load(total + split, mask=split < splits, other=-float("inf"))
        share = tl.exp2(share - pivot)
        mask = (share > 0)[:, None] & (column < VALUE_DIM)[None, :]
        tile = tl.load(partial + split[:, None] * VALUE_DIM + column[None, :], mask=mask, other=0.0)
        weight += share
        weighted += tl.sum(share[:, None] * tile, 0)
    whole = tl.sum(weight)
    result = weighted / tl.where(whole > 0, whole, 1.0)
    tl.store(
        output + row * VALUE_DIM + column,
        result.to(output.dtype.element_ty),
        mask=column < VALUE_DIM,
    )
