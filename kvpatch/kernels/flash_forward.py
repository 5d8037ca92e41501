"""Forward pass of fused attention: one program for each tile of queries of a head.

The running softmax is that of FlashAttention-2 (arXiv:2307.08691, section 3.1), in units of log2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpatch.kernels.tiles import (
    keys_of_rows,
    load_tile,
    place,
    scores,
    spans_of_rows,
    store_tile,
    visible,
)

__all__ = ["flash_forward"]


@triton.jit
def _attend(
    weighted, total, peak, query, query_rope, key, value, key_rope, key_n, value_n, key_rope_n,
    start, end, slope, first, last, skip, skipped, inner, outer,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The running softmax taken on over the keys from ``first`` to ``last``.

    Args:
        weighted: Sum of weighted values so far.
        total: Sum of weights so far.
        peak: Greatest score so far; weights are relative to it.
        query: Tile of queries; ``query_rope`` likewise.
        key: First key of the head; ``value`` and ``key_rope`` likewise.
        key_n: Elements from one key to the next; ``value_n`` and ``key_rope_n`` likewise.
        start: Of the spans; ``end`` likewise.
        slope: As in ``scores``; ``inner`` and ``outer`` likewise.
        first: Key, a multiple of ``BLOCK_N``.
        last: Key to stop before, which is not read.
        skip: Key from which on so many are left out:
        skipped: A multiple of ``BLOCK_N``.
        WHOLE: Whether all rows see all of these keys.
    """
    for step in tl.range(first, last - skipped, BLOCK_N):
        n0 = step + tl.where(step >= skip, skipped, 0)
        n = n0 + tl.arange(0, BLOCK_N)
        keys = load_tile(key, n0, last, key_n, BLOCK_N, DIM, BLOCK_D, WHOLE)
        products = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if ROPE_DIM > 0:
            rotary = load_tile(key_rope, n0, last, key_rope_n, BLOCK_N, ROPE_DIM, BLOCK_R, WHOLE)
            products = tl.dot(query_rope, tl.trans(rotary), products, input_precision=PRECISION)
        if CAPPED or BIASED:
            score, _ = scores(
                products, n[None, :], end[:, None], slope, inner, outer, CAPPED, BIASED
            )
            factor = 1.0
        else:  # multiplied as late as possible, where it costs nothing
            score = products
            factor = inner
        if not WHOLE:
            score = tl.where(
                visible(start[:, None], end[:, None], n[None, :]), score, -float("inf")
            )
        risen = tl.maximum(peak, tl.max(score, 1) * factor)
        # of a row that has seen nothing yet the greatest score is no number
        pivot = risen if WHOLE else tl.where(risen == -float("inf"), 0.0, risen)
        weight = tl.exp2(score * factor - pivot[:, None])
        fade = tl.exp2(peak - pivot)
        total = total * fade + tl.sum(weight, 1)
        values = load_tile(value, n0, last, value_n, BLOCK_N, VALUE_DIM, BLOCK_V, WHOLE)
        weighted = weighted * fade[:, None]
        weighted = tl.dot(weight.to(values.dtype), values, weighted, input_precision=PRECISION)
        peak = risen
    return weighted, total, peak


@triton.jit(do_not_specialize=["all_heads", "heads", "group", "queries", "keys", "section"])
def flash_forward(
    query, key, value, query_rope, key_rope, span, slopes, output, lse,
    query_b, query_h, query_t, key_b, key_h, key_n, value_b, value_h, value_n,
    query_rope_b, query_rope_h, query_rope_t, key_rope_b, key_rope_n, span_b, span_t,
    all_heads, heads, group, queries, keys, section, inner, outer,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output [B, T, H, Dv] and log-sums [B, H, T] of one tile of queries; grid: tiles x B x H.

    Args:
        query: [B, H, T, D], of the strides ``query_b``, ``query_h``, ``query_t`` and 1; the other
            tensors are named and strided likewise, but for the contiguous ``output`` and ``lse``.
        slopes: float32 [H], or None.
        all_heads: B x H.
        heads: H.
        group: Query heads that share a key head.
        queries: T.
        keys: K.
        section: As in ``place``; ``inner`` and ``outer`` as in ``scores``.
        DIM: D; ``VALUE_DIM`` and ``ROPE_DIM`` likewise, the latter 0 without a rotary part.
        BLOCK_D: The next power of two; ``BLOCK_V`` and ``BLOCK_R`` likewise.
        PRECISION: Of products in float32.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    rank, b, h = place(tiles, all_heads, heads, section)
    t0 = (tiles - 1 - rank) * BLOCK_M  # the last see the most keys and begin first
    start, end = spans_of_rows(span + b * span_b, span_t, t0, queries, keys, BLOCK_M)
    begin, stop, whole_begin, whole_end = keys_of_rows(
        start, end, t0, queries, keys, BLOCK_M, BLOCK_N
    )

    query += b * query_b + h.to(tl.int64) * query_h
    query_tile = load_tile(query, t0, queries, query_t, BLOCK_M, DIM, BLOCK_D, False)
    kv_head = (h // group).to(tl.int64)
    key += b * key_b + kv_head * key_h
    value += b * value_b + kv_head * value_h
    rope_tile = query_tile
    if ROPE_DIM > 0:
        query_rope += b * query_rope_b + h.to(tl.int64) * query_rope_h
        rope_tile = load_tile(
            query_rope, t0, queries, query_rope_t, BLOCK_M, ROPE_DIM, BLOCK_R, False
        )
        key_rope += b * key_rope_b
    slope = 0.0
    if BIASED:
        slope = tl.load(slopes + h) * 1.4426950408889634

    weighted = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    # first the keys that all rows see, then those before and behind them
    for whole in tl.static_range(1, -1, -1):
        first = whole_begin if whole else begin
        last = whole_end if whole else stop
        skipped = 0 if whole else whole_end - whole_begin
        weighted, total, peak = _attend(
            weighted, total, peak, query_tile, rope_tile, key, value, key_rope,
            key_n, value_n, key_rope_n,
            start, end, slope, first, last, whole_begin, skipped, inner, outer,
            DIM, VALUE_DIM, ROPE_DIM, BLOCK_D, BLOCK_V, BLOCK_R, CAPPED, BIASED, PRECISION,
            BLOCK_N, whole == 1,
        )  # fmt: skip

    seen = total > 0.0
    row = t0 + tl.arange(0, BLOCK_M)
    logarithm = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), -float("inf"))
    at = lse + (b * heads + h) * queries + row
    tl.store(at, logarithm * 0.6931471805599453, mask=row < queries)
    result = weighted * (1.0 / tl.where(seen, total, 1.0))[:, None]
    output += (b * queries * heads + h) * VALUE_DIM
    store_tile(output, result, t0, queries, heads * VALUE_DIM, BLOCK_M, VALUE_DIM, BLOCK_V)
