"""Attention of few queries to many keys: each program reads a share of the keys of one KV head.

Flash-Decoding (https://pytorch.org/blog/flash-decoding) with the query heads of a KV head packed
into the rows of a tile, so that its keys are read once. Latent attention is the same with one KV
head for all, whose keys, but for a rotary part that is apart, are its values too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpatch.kernels.tiles import scores, visible

__all__ = ["split_kernel"]


@triton.jit
def _rows(base, offset, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of width ``WIDTH`` at offsets; zeros where not inside and beyond the width."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _share(start, end, keys, split, splits, BLOCK_N: tl.constexpr):
    """First key and the one past the last that a split reads, out of those that any row sees.

    Where the cache is static only the device knows what is in sight. So the splits share the tiles
    of that here, evenly to one tile.
    """
    seen = start < end
    first = tl.maximum(tl.min(tl.where(seen, start, keys)), 0)
    last = tl.minimum(tl.max(tl.where(seen, end, 0)), keys)
    tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK_N)
    begin = first + split * tiles // splits * BLOCK_N
    return begin, tl.minimum(first + (split + 1) * tiles // splits * BLOCK_N, last)


# a number that changes from step to step must not make Triton compile anew
@triton.jit(do_not_specialize=["kv_heads", "group", "scale_group", "queries", "keys", "splits"])
def split_kernel(
    query, key, value, query_rope, key_rope, key_scale, span, slopes, output, total,
    query_b, query_h, query_t, key_b, key_h, key_n, value_b, value_h, value_n,
    query_rope_b, query_rope_h, query_rope_t, key_rope_b, key_rope_n,
    key_scale_b, key_scale_h, key_scale_n, span_b, span_t,
    kv_heads, group, scale_group, queries, keys, splits, inner, outer,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of rows to one split; grid: tiles x splits x Hkv x B, the first fastest.

    A row is a query token and one of the query heads of a KV head. Where a split sees nothing its
    ``total`` is minus infinity and its ``output`` is not written.

    Args:
        query: [B, H, T, D], of the strides ``query_b``, ``query_h``, ``query_t`` and 1; the other
            tensors are named and strided likewise, but for the contiguous ``output`` and ``total``.
        value: [B, Hkv, K, Dv]; None where the keys are the values.
        query_rope: [B, H, T, Dr], or None; ``key_rope`` [B, 1, K, Dr] likewise.
        key_scale: [B, H / scale_group, K], factors on the scores, or None.
        slopes: [H], or None.
        output: [B, T, H, splits, Dv].
        total: float32 [B, T, H, splits], logarithms to base 2 of the sums of exponentials; None
            where there is one split, which then writes all of ``output``.
        kv_heads: Hkv.
        group: Query heads that share a KV head.
        scale_group: Query heads that share a factor.
        queries: T.
        keys: K.
        splits: Shares of the keys.
        inner: As in ``scores``; ``outer`` likewise.
        DIM: D; ``VALUE_DIM`` and ``ROPE_DIM`` likewise.
        BLOCK_D: The next power of two; ``BLOCK_V`` and ``BLOCK_R`` likewise.
    """
    # tiles of the same keys are neighbours: all but the first find them in the L2 cache
    tiles = tl.cdiv(queries * group, BLOCK_M)
    program = tl.program_id(0)
    split = program // tiles % splits
    b = (program // (tiles * splits) // kv_heads).to(tl.int64)
    kv_head = program // (tiles * splits) % kv_heads
    row = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = row // group, kv_head * group + row % group
    real = t < queries

    sight = span + b * span_b + t * span_t
    start = tl.load(sight, mask=real, other=0)
    end = tl.load(sight + 1, mask=real, other=0)
    begin, stop = _share(start, end, keys, split, splits, BLOCK_N)

    tile = _rows(query + b * query_b, h * query_h + t * query_t, real, DIM, BLOCK_D)
    key += b * key_b + kv_head.to(tl.int64) * key_h
    if value is not None:
        value += b * value_b + kv_head.to(tl.int64) * value_h
    if query_rope is not None:
        first = h * query_rope_h + t * query_rope_t
        rope_tile = _rows(query_rope + b * query_rope_b, first, real, ROPE_DIM, BLOCK_R)
        key_rope += b * key_rope_b
    if key_scale is not None:
        factor = key_scale + b * key_scale_b + h // scale_group * key_scale_h
    slope = 0.0
    if BIASED:
        slope = (tl.load(slopes + h, mask=real, other=0.0) * 1.4426950408889634)[:, None]

    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for n0 in tl.range(begin, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        far = n.to(tl.int64)
        # in float32 by plain arithmetic, which is exact, and fast enough for few rows
        k = _rows(key, far * key_n, n < stop, DIM, BLOCK_D)
        s = tl.dot(tile, tl.trans(k), input_precision="ieee")
        if query_rope is not None:
            rotary = _rows(key_rope, far * key_rope_n, n < stop, ROPE_DIM, BLOCK_R)
            s = tl.dot(rope_tile, tl.trans(rotary), s, input_precision="ieee")
        seen = visible(start[:, None], tl.minimum(end, stop)[:, None], n[None, :])
        if key_scale is not None:
            factors = factor[:, None] + (far * key_scale_n)[None, :]
            s *= tl.load(factors, mask=seen, other=0.0).to(tl.float32)
        s, _ = scores(s, n[None, :], end[:, None], slope, inner, outer, CAPPED, BIASED)
        s = tl.where(seen, s, -float("inf"))

        risen = tl.maximum(peak, tl.max(s, 1))
        # finite where a row has seen nothing yet
        pivot = tl.where(risen == -float("inf"), 0.0, risen)
        s = tl.exp2(s - pivot[:, None])
        fade = tl.exp2(peak - pivot)
        weight = weight * fade + tl.sum(s, 1)
        v = k if value is None else _rows(value, far * value_n, n < stop, VALUE_DIM, BLOCK_V)
        weighted = tl.dot(s.to(v.dtype), v, weighted * fade[:, None], input_precision="ieee")
        peak = risen

    divisor = tl.where(weight > 0, weight, 1.0)
    base = b * queries * kv_heads * group * splits
    place = (t * kv_heads * group + h) * splits + split
    column = tl.arange(0, BLOCK_V)
    mask = real[:, None] & (column < VALUE_DIM)[None, :]
    if total is not None:
        tl.store(total + base + place, peak + tl.log2(divisor), mask=real)
        mask &= (weight > 0)[:, None]
    output += base * VALUE_DIM
    result = (weighted / divisor[:, None]).to(output.dtype.element_ty)
    tl.store(output + place[:, None] * VALUE_DIM + column[None, :], result, mask=mask)
