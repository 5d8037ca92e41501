"""KV cache sizes: the one source of these formulas for plans, cards and tables.

A layer of plain attention stores ``kv_heads * (head_dim + value_dim)`` numbers per token; a layer
that reads the keys and values of another stores none (CLA, arXiv:2405.12981); a latent layer stores
``rank + rope_dim`` (MLA, arXiv:2405.04434 section 2.1), and the scales of its keys where these have
a norm; a sliding-window layer stops growing at its window. Sizes are in bytes, decimal units
(1 MB = 10**6 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["KVCache", "LayerCache", "format_bytes", "latent_cache", "multi_head_cache"]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps: ``values`` numbers per token, for at most ``window`` tokens."""

    values: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class KVCache:
    """The KV cache of a whole model.

    Args:
        layers: One entry per decoder layer.
        bytes_per_value: Width of a stored number, 2 for bfloat16.
    """

    layers: tuple[LayerCache, ...]
    bytes_per_value: int = 2

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds while every layer still grows."""
        return self.bytes_per_value * sum(layer.values for layer in self.layers)

    def size(self, tokens: int, batch: int = 1) -> int:
        """Bytes held after ``tokens`` tokens of ``batch`` sequences."""
        held = sum(
            layer.values * (tokens if layer.window is None else min(tokens, layer.window))
            for layer in self.layers
        )
        return self.bytes_per_value * batch * held


def multi_head_cache(
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    sources: Sequence[int] | None = None,
    windows: Sequence[int | None] | None = None,
    bytes_per_value: int = 2,
) -> KVCache:
    """Cache of MHA, GQA, MQA, and of CLA where layers read the KV heads of another.

    Args:
        layers: Number of decoder layers.
        kv_heads: KV heads of a layer that has its own.
        head_dim: Width of a key head.
        value_dim: Width of a value head; ``head_dim`` if not given.
        sources: For each layer the one whose keys and values it reads; None if all have their own.
        windows: Sliding window of each layer, None where a layer sees everything. A shared set is
            kept for as long as its widest reader looks back.
        bytes_per_value: Width of a stored number.
    """
    own = kv_heads * (head_dim + (head_dim if value_dim is None else value_dim))
    return _cache([own] * layers, sources, windows, bytes_per_value)


def latent_cache(
    *,
    layers: int,
    rank: int | Sequence[int],
    rope_dim: int | Sequence[int],
    scales: int = 0,
    sources: Sequence[int] | None = None,
    windows: Sequence[int | None] | None = None,
    bytes_per_value: int = 2,
) -> KVCache:
    """Cache of MLA, and of CLA where layers read the latents of another.

    Args:
        layers: Number of decoder layers.
        rank: Width of the latent, of all layers or of each.
        rope_dim: Width of the rotary key, of all layers or of each.
        scales: Numbers beside them, factors of the keys where these have a norm.
        sources: For each layer the one whose latents it reads; None if all have their own.
        windows: As in ``multi_head_cache``.
        bytes_per_value: Width of a stored number.
    """
    ranks, ropes = (
        [width] * layers if isinstance(width, int) else width for width in (rank, rope_dim)
    )
    own = [one + other + scales for one, other in zip(ranks, ropes, strict=True)]
    return _cache(own, sources, windows, bytes_per_value)


def _cache(
    own: Sequence[int],
    sources: Sequence[int] | None,
    windows: Sequence[int | None] | None,
    bytes_per_value: int,
) -> KVCache:
    """Cache of layers that would each store ``own`` numbers, if none read another's."""
    spans = windows if windows is not None else [None] * len(own)
    read = range(len(own)) if sources is None else sources
    return KVCache(
        tuple(
            LayerCache(values if read[layer] == layer else 0, _longest(spans, read, layer))
            for layer, values in enumerate(own)
        ),
        bytes_per_value,
    )


def _longest(windows: Sequence[int | None], sources: Sequence[int], layer: int) -> int | None:
    """How far back a layer or any that reads its keys and values looks."""
    readers = [w for w, source in zip(windows, sources, strict=True) if source == layer]
    limited = [window for window in readers or [windows[layer]] if window is not None]
    return max(limited) if len(limited) == max(1, len(readers)) else None


def format_bytes(size: float) -> str:
    """Bytes in decimal units with three significant digits: ``4.00 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    if unit == "B":
        return f"{size:.0f} B"
    return f"{size:.{max(0, 3 - len(str(int(abs(size)))))}f} {unit}"
