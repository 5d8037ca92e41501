"""What the kernels of ``flash`` share: places of programs, tiles, spans and scores.

Scores are kept in units of log2, so that ``exp2`` alone stands between them and the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keys_of_rows", "load_tile", "place", "scores", "spans_of_rows", "store_tile", "visible"]


@triton.jit
def place(tiles, all_heads, heads, section):
    """Rank of the tile, batch entry (64 bits wide) and head of this program.

    All tiles of a section of heads come before the next section, so that what the heads of a
    section read stays in the L2 cache; tiles of a rank are neighbours.
    """
    program = tl.program_id(0)
    first = program // (section * tiles) * section
    size = tl.minimum(section, all_heads - first)
    within = program - first * tiles
    head = first + within % size
    return within // size, (head // heads).to(tl.int64), head % heads


@triton.jit
def load_tile(
    base, first, limit, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``first + ROWS`` of a matrix, [ROWS, BLOCK], zero outside of it.

    Args:
        base: Its first element.
        first: Row.
        limit: Its rows.
        stride: Elements from one row to the next.
        ROWS: Of the tile.
        WIDTH: Columns of the matrix.
        BLOCK: Columns of the tile, a power of two.
        WHOLE: Whether all rows of the tile are known to be in the matrix.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    # 64 bits for the tile, which may be far off, and 32 inside of it
    at = (base + tl.cast(first, tl.int64) * stride) + (row[:, None] * stride + column[None, :])
    if WHOLE and WIDTH == BLOCK:
        tile = tl.load(at)
    elif WHOLE:
        tile = tl.load(at, mask=column[None, :] < WIDTH, other=0.0)
    elif WIDTH == BLOCK:
        tile = tl.load(at, mask=(first + row < limit)[:, None], other=0.0)
    else:
        mask = (first + row < limit)[:, None] & (column[None, :] < WIDTH)
        tile = tl.load(at, mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(
    base, tile, first, limit, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write rows ``first`` to ``first + ROWS`` of a matrix, as ``load_tile`` reads them."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = (base + tl.cast(first, tl.int64) * stride) + (row * stride + column)
    tl.store(at, tile.to(base.dtype.element_ty), mask=(first + row < limit) & (column < WIDTH))


@triton.jit
def spans_of_rows(span, span_t, first, queries, keys, ROWS: tl.constexpr):
    """Spans of rows of queries, clipped to the keys; those of rows past the last are empty.

    Args:
        span: First element of the spans of the batch entry.
        span_t: Elements from one to the next.
        first: Row.
        queries: Number of queries.
        keys: Number of keys.
        ROWS: How many.
    """
    t = first + tl.arange(0, ROWS)
    at = span + t.to(tl.int64) * span_t
    start = tl.maximum(tl.load(at, mask=t < queries, other=keys), 0)
    end = tl.minimum(tl.load(at + 1, mask=t < queries, other=0), keys)
    return start, end


@triton.jit
def keys_of_rows(start, end, first, queries, keys, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys a tile of queries sees: those of some row, and in them those of all rows.

    Returns:
        ``begin`` and ``end`` of the former, ``whole_begin`` and ``whole_end`` of the latter; all
        but ``end`` are multiples of ``BLOCK_N``, unless there are none of the latter, in which case
        both are ``end``.
    """
    within = first + tl.arange(0, ROWS) < queries
    seen = end > start
    begin = tl.min(tl.where(seen, start, keys)) // BLOCK_N * BLOCK_N
    stop = tl.max(tl.where(seen, end, 0))
    # an empty row makes this range empty too
    whole_begin = tl.cdiv(tl.max(tl.where(within, start, 0)), BLOCK_N) * BLOCK_N
    whole_end = tl.min(tl.where(within, end, keys)) // BLOCK_N * BLOCK_N
    some = whole_begin < whole_end
    return begin, stop, tl.where(some, whole_begin, stop), tl.where(some, whole_end, stop)


@triton.jit
def visible(low, high, at):
    """Whether keys at some places are in spans, or queries in the ranges that see keys."""
    return (at >= low) & (at < high)


@triton.jit
def scores(
    products, n, end, slope, inner, outer, CAPPED: tl.constexpr, BIASED: tl.constexpr
):  # fmt: skip
    """Scores in units of log2, and the tanh of the softcap, which its gradient needs.

    Args:
        products: Of queries and keys.
        n: Positions of keys.
        end: Ends of the spans of queries.
        slope: Of ALiBi, in units of log2.
        inner: Factor on products; where there is a softcap, in the exponent of the sigmoid.
        outer: The softcap in units of log2.
        CAPPED: Whether there is a softcap.
        BIASED: Whether there is ALiBi.
    """
    if CAPPED:
        # tanh(x) = 2 sigmoid(2 x) - 1; the sign and the factor 2 are part of ``inner``
        bounded = 2.0 / (1.0 + tl.exp2(products * inner)) - 1.0
        result = bounded * outer
    else:
        bounded = products
        result = products * inner
    if BIASED:
        result += slope * (n - (end - 1)).to(tl.float32)
    return result, bounded
