"""Backward pass of fused attention: the gradient of queries, then that of keys and values.

Scores are computed anew in both, from the log-sums of the forward pass (FlashAttention-2,
arXiv:2307.08691, section 3.2). Every sum has one order and nothing is added atomically, so the
gradients of two runs are the same to the bit.
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

__all__ = ["flash_backward_keys", "flash_backward_queries"]


@triton.jit
def _log_sums(lse, row, queries):
    """Log-sums of rows in units of log2; minus infinity where nothing is seen.

    Args:
        lse: The first of the head.
        row: Which rows.
        queries: How many there are.
    """
    return tl.load(lse + row, mask=row < queries, other=0.0) * 1.4426950408889634


@triton.jit
def _score_gradient(
    products, grad_weight, delta, total, low, high, at, n, end, slope, inner, outer,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Weights of keys and the gradient of their products with queries, but for the scale.

    Args:
        products: Of queries and keys.
        grad_weight: Gradient of the weights.
        delta: Mean of it under the weights.
        total: As of ``_log_sums``.
        low: As in ``visible``; ``high`` and ``at`` likewise.
        n: As in ``scores``; ``end``, ``slope``, ``inner`` and ``outer`` likewise.
        WHOLE: Whether all of these queries see all of these keys.
    """
    score, bounded = scores(products, n, end, slope, inner, outer, CAPPED, BIASED)
    weight = tl.exp2(score - total)
    if not WHOLE:  # where it may be infinite
        weight = tl.where(visible(low, high, at), weight, 0.0)
    grad = weight * (grad_weight - delta)
    if CAPPED:
        grad *= 1.0 - bounded * bounded
    return weight, grad


@triton.jit
def _attend(
    grad_query, grad_rotary, query, query_rope, grad, delta, total,
    key, value, key_rope, key_n, value_n, key_rope_n,
    start, end, slope, first, last, skip, skipped, inner, outer,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries with what the keys from ``first`` to ``last`` add."""
    for step in tl.range(first, last - skipped, BLOCK_N):
        n0 = step + tl.where(step >= skip, skipped, 0)
        n = n0 + tl.arange(0, BLOCK_N)
        keys = load_tile(key, n0, last, key_n, BLOCK_N, DIM, BLOCK_D, WHOLE)
        products = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if ROPE_DIM > 0:
            rotary = load_tile(key_rope, n0, last, key_rope_n, BLOCK_N, ROPE_DIM, BLOCK_R, WHOLE)
            products = tl.dot(query_rope, tl.trans(rotary), products, input_precision=PRECISION)
        values = load_tile(value, n0, last, value_n, BLOCK_N, VALUE_DIM, BLOCK_V, WHOLE)
        grad_weight = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        _, grad_product = _score_gradient(
            products, grad_weight, delta[:, None], total[:, None], start[:, None], end[:, None],
            n[None, :], n[None, :], end[:, None], slope, inner, outer, CAPPED, BIASED, WHOLE,
        )  # fmt: skip
        grad_product = grad_product.to(keys.dtype)
        grad_query = tl.dot(grad_product, keys, grad_query, input_precision=PRECISION)
        if ROPE_DIM > 0:
            grad_rotary = tl.dot(grad_product, rotary, grad_rotary, input_precision=PRECISION)
    return grad_query, grad_rotary


@triton.jit(do_not_specialize=["all_heads", "heads", "group", "queries", "keys", "section"])
def flash_backward_queries(
    grad, output, lse, delta, grad_query, grad_query_rope,
    query, key, value, query_rope, key_rope, span, slopes,
    grad_b, grad_t, grad_h, query_b, query_h, query_t, key_b, key_h, key_n,
    value_b, value_h, value_n, query_rope_b, query_rope_h, query_rope_t,
    key_rope_b, key_rope_n, span_b, span_t,
    all_heads, heads, group, queries, keys, section, inner, outer, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and ``delta`` of it; grid: tiles x B x H.

    Args:
        grad: Of the output, [B, T, H, Dv], with strides.
        output: Of the forward pass, as ``lse``.
        delta: float32 [B, H, T], written: sums over Dv of ``grad`` times ``output``.
        grad_query: [B, T, H, D], contiguous, written; ``grad_query_rope`` likewise, or None.
        query: As in ``flash_forward``, as all that is not named here.
        scale: Factor on the products.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    rank, b, h = place(tiles, all_heads, heads, section)
    t0 = (tiles - 1 - rank) * BLOCK_M
    row = t0 + tl.arange(0, BLOCK_M)
    start, end = spans_of_rows(span + b * span_b, span_t, t0, queries, keys, BLOCK_M)
    begin, stop, whole_begin, whole_end = keys_of_rows(
        start, end, t0, queries, keys, BLOCK_M, BLOCK_N
    )

    head = h.to(tl.int64)
    query += b * query_b + head * query_h
    query_tile = load_tile(query, t0, queries, query_t, BLOCK_M, DIM, BLOCK_D, False)
    kv_head = (h // group).to(tl.int64)
    key += b * key_b + kv_head * key_h
    value += b * value_b + kv_head * value_h
    rope_tile = query_tile
    grad_rotary = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if ROPE_DIM > 0:
        query_rope += b * query_rope_b + head * query_rope_h
        rope_tile = load_tile(
            query_rope, t0, queries, query_rope_t, BLOCK_M, ROPE_DIM, BLOCK_R, False
        )
        key_rope += b * key_rope_b
    slope = 0.0
    if BIASED:
        slope = tl.load(slopes + h) * 1.4426950408889634

    output += (b * queries * heads + h) * VALUE_DIM
    output_tile = load_tile(
        output, t0, queries, heads * VALUE_DIM, BLOCK_M, VALUE_DIM, BLOCK_V, False
    )
    grad += b * grad_b + head * grad_h
    grad_tile = load_tile(grad, t0, queries, grad_t, BLOCK_M, VALUE_DIM, BLOCK_V, False)
    mean = tl.sum(output_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    rows = (b * heads + h) * queries
    tl.store(delta + rows + row, mean, mask=row < queries)
    total = _log_sums(lse + rows, row, queries)

    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for whole in tl.static_range(1, -1, -1):
        first = whole_begin if whole else begin
        last = whole_end if whole else stop
        skipped = 0 if whole else whole_end - whole_begin
        sums, grad_rotary = _attend(
            sums, grad_rotary, query_tile, rope_tile, grad_tile, mean, total,
            key, value, key_rope, key_n, value_n, key_rope_n,
            start, end, slope, first, last, whole_begin, skipped, inner, outer,
            DIM, VALUE_DIM, ROPE_DIM, BLOCK_D, BLOCK_V, BLOCK_R, CAPPED, BIASED, PRECISION,
            BLOCK_N, whole == 1,
        )  # fmt: skip

    token = (b * queries * heads + h).to(tl.int64)
    store_tile(
        grad_query + token * DIM, sums * scale, t0, queries, heads * DIM, BLOCK_M, DIM, BLOCK_D
    )
    if ROPE_DIM > 0:
        store_tile(
            grad_query_rope + token * ROPE_DIM, grad_rotary * scale, t0, queries, heads * ROPE_DIM,
            BLOCK_M, ROPE_DIM, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _first_beyond(ends, stride, bound, queries):
    """First query whose end is greater than a bound, their number if none is, by bisection.

    Args:
        ends: First of them, which do not decrease.
        stride: From one to the next.
        bound: Any number of bounds, each bisected for.
        queries: Number of ends.
    """
    low = tl.zeros_like(bound)
    high = low + queries
    left = queries
    while left > 0:
        middle = (low + high) // 2
        apart = low < high
        end = tl.load(ends + middle.to(tl.int64) * stride, mask=apart, other=0)
        low = tl.where(apart & (end <= bound), middle + 1, low)
        high = tl.where(apart & (end > bound), middle, high)
        left = left // 2
    return low


@triton.jit(
    do_not_specialize=[
        "all_shares",
        "shares",
        "share",
        "batch",
        "heads",
        "group",
        "queries",
        "keys",
        "section",
    ]
)
def flash_backward_keys(
    grad, lse, delta, grad_key, grad_value, grad_key_rope,
    query, key, value, query_rope, key_rope, span, slopes,
    grad_b, grad_t, grad_h, query_b, query_h, query_t, key_b, key_h, key_n,
    value_b, value_h, value_n, query_rope_b, query_rope_h, query_rope_t,
    key_rope_b, key_rope_n, span_b, span_t,
    all_shares, shares, share, batch, heads, group, queries, keys, section, inner, outer, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values; grid: tiles x B x Hkv x parts of a group.

    A program goes through the queries of all heads of its part of the group in one loop, so their
    sum is in its registers and nothing is expanded to H heads.

    Args:
        grad: As in ``flash_backward_queries``, as all that is not named here.
        grad_key: [P, B, K, Hkv, D], contiguous, written, where P is the number of parts in which
            a group is; ``grad_value`` likewise.
        grad_key_rope: float32 [P, B, K, Hkv, Dr], or None.
        all_shares: B x Hkv x P.
        shares: Hkv x P.
        share: Query heads of a part; the last of a group may have fewer.
        batch: B.
        heads: H.
    """
    rank, b, member = place(tl.cdiv(keys, BLOCK_N), all_shares, shares, section)
    n0 = rank * BLOCK_N  # the first are seen by the most queries and begin first
    n = n0 + tl.arange(0, BLOCK_N)
    kv_heads = heads // group
    part = member // kv_heads
    kv_head = member % kv_heads
    first_head = kv_head * group + part * share
    members = tl.minimum(share, group - part * share)

    # no end of a span falls, so the queries that see a key are neighbours too
    span += b * span_b
    since = _first_beyond(span + 1, span_t, n, queries)
    until = tl.where(n < keys, _first_beyond(span, span_t, n, queries), 0)
    first_row = tl.min(since) // BLOCK_M * BLOCK_M
    tiles = tl.maximum(tl.cdiv(tl.max(until) - first_row, BLOCK_M), 0)

    key += b * key_b + kv_head.to(tl.int64) * key_h
    value += b * value_b + kv_head.to(tl.int64) * value_h
    key_tile = load_tile(key, n0, keys, key_n, BLOCK_N, DIM, BLOCK_D, False)
    value_tile = load_tile(value, n0, keys, value_n, BLOCK_N, VALUE_DIM, BLOCK_V, False)
    key_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    query += b * query_b
    grad += b * grad_b
    if ROPE_DIM > 0:
        query_rope += b * query_rope_b
        key_rope += b * key_rope_b
        rotary_tile = load_tile(key_rope, n0, keys, key_rope_n, BLOCK_N, ROPE_DIM, BLOCK_R, False)
        rotary_sums = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)

    for step in tl.range(0, members * tiles):
        h = first_head + step // tiles
        head = h.to(tl.int64)
        t0 = first_row + step % tiles * BLOCK_M
        row = t0 + tl.arange(0, BLOCK_M)
        end = row
        slope = 0.0
        if BIASED:
            slope = tl.load(slopes + h) * 1.4426950408889634
            _, end = spans_of_rows(span, span_t, t0, queries, keys, BLOCK_M)
        rows = (b * heads + h) * queries
        total = _log_sums(lse + rows, row, queries)
        mean = tl.load(delta + rows + row, mask=row < queries, other=0.0)

        queries_tile = load_tile(
            query + head * query_h, t0, queries, query_t, BLOCK_M, DIM, BLOCK_D, False
        )
        products = tl.dot(key_tile, tl.trans(queries_tile), input_precision=PRECISION)
        if ROPE_DIM > 0:
            rope_tile = load_tile(
                query_rope + head * query_rope_h, t0, queries, query_rope_t, BLOCK_M, ROPE_DIM,
                BLOCK_R, False,
            )  # fmt: skip
            products = tl.dot(rotary_tile, tl.trans(rope_tile), products, input_precision=PRECISION)
        grad_tile = load_tile(
            grad + head * grad_h, t0, queries, grad_t, BLOCK_M, VALUE_DIM, BLOCK_V, False
        )
        grad_weight = tl.dot(value_tile, tl.trans(grad_tile), input_precision=PRECISION)
        weight, grad_product = _score_gradient(
            products, grad_weight, mean[None, :], total[None, :], since[:, None], until[:, None],
            row[None, :], n[:, None], end[None, :], slope, inner, outer, CAPPED, BIASED, False,
        )  # fmt: skip
        value_sums = tl.dot(
            weight.to(grad_tile.dtype), grad_tile, value_sums, input_precision=PRECISION
        )
        grad_product = grad_product.to(queries_tile.dtype)
        key_sums = tl.dot(grad_product, queries_tile, key_sums, input_precision=PRECISION)
        if ROPE_DIM > 0:
            rotary_sums = tl.dot(grad_product, rope_tile, rotary_sums, input_precision=PRECISION)

    base = ((part * batch + b) * keys * kv_heads + kv_head).to(tl.int64)
    store_tile(
        grad_key + base * DIM, key_sums * scale, n0, keys, kv_heads * DIM,
        BLOCK_N, DIM, BLOCK_D,
    )  # fmt: skip
    store_tile(
        grad_value + base * VALUE_DIM, value_sums, n0, keys, kv_heads * VALUE_DIM,
        BLOCK_N, VALUE_DIM, BLOCK_V,
    )  # fmt: skip
    if ROPE_DIM > 0:
        store_tile(
            grad_key_rope + base * ROPE_DIM, rotary_sums * scale, n0, keys, kv_heads * ROPE_DIM,
            BLOCK_N, ROPE_DIM, BLOCK_R,
        )  # fmt: skip
