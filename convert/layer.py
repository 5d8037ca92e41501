"""The canonical form: one attention layer as plain tensors, the same for every model family.

Shape letters, fixed in the whole project:
    B batch   T tokens   H query heads   Hkv KV heads   D width of a query/key head
    Dv width of a value head   E hidden width   R latent rank   L layers
    Dn and Dr: dims of a latent layer's query without and with positions, D = Dn + Dr
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = [
    "AttentionLayer",
    "Geometry",
    "LatentGeometry",
    "LatentLayer",
    "NormFormula",
    "NormLayout",
    "QkNorm",
    "Rope",
]

NormLayout = Literal["shared", "per_head", "full"]
NormFormula = Literal["rms", "rms_plus_one", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions of one layer.

    Args:
        dim: Leading dims of a head that rotate; 0 means no positions (NoPE).
        interleaved: Pairs are (2i, 2i+1) if true, else (i, i + dim/2).
        theta: Base of the frequencies ``theta ** (-2i / dim)``.
        kind: ``default``, or the name of the frequency scaling (llama3, yarn, longrope, ...).
    """

    dim: int
    interleaved: bool
    theta: float
    kind: str = "default"


@dataclass(frozen=True, slots=True)
class QkNorm:
    """Normalisation between the query/key projections and RoPE.

    Args:
        layout: ``shared`` is one weight [D] for all heads, ``per_head`` one [D] for each head,
            ``full`` one norm over the concatenated heads [H * D].
        formula: RMS norm, RMS norm with weight 1 + w, or LayerNorm.
    """

    layout: NormLayout
    formula: NormFormula


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes of the attention of one layer: E, H, Hkv, D and Dv."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def latent(self, rank: int, rope_dim: int) -> LatentGeometry:
        """Sizes of the same heads as they read a latent."""
        return LatentGeometry(
            hidden=self.hidden,
            heads=self.heads,
            rank=rank,
            nope_dim=self.head_dim,
            rope_dim=rope_dim,
            value_dim=self.value_dim,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """Weights of one attention layer, on the CPU, in the dtype of the checkpoint.

    A field is None where the checkpoint has no such tensor, or where the method at hand leaves it
    untouched and it was therefore not read. Query head h reads KV head ``h // geometry.group``.

    Args:
        geometry: Sizes; ``kv_heads`` is the leading axis of every KV field.
        q: [H, D, E].
        k: [Hkv, D, E].
        v: [Hkv, Dv, E].
        o: [E, H, Dv].
        q_bias: [H, D].
        k_bias: [Hkv, D].
        v_bias: [Hkv, Dv].
        o_bias: [E].
        q_norm: [D] if shared by the heads, else [H, D].
        k_norm: [D] if shared by the heads, else [Hkv, D].
        q_norm_bias: Like ``q_norm``; only a LayerNorm has one.
        k_norm_bias: Like ``k_norm``.
        q_map: [H, D', D] what query heads are multiplied by after their norm; only the expanded
            form of a latent layer has it.
        rope: Rotary positions; None where the method does not need them.
    """

    geometry: Geometry
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    o: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_bias: Tensor | None = None
    q_map: Tensor | None = None
    rope: Rope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGeometry:
    """Sizes of a latent layer: E, H, R, Dn, Dr and Dv."""

    hidden: int
    heads: int
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentLayer:
    """Multi-head latent attention of one layer (arXiv:2405.04434, section 2.1).

    An input x gives every token one latent ``c = latent x + latent_bias`` and one rotary key ``r =
    RoPE(k_rope x + k_rope_bias)``, which is all that is cached. Query head h, ``q_h = q x +
    q_bias``, scores a token with ``scale * (q_h[:Dn] . (k_up_h c) + RoPE(q_h[Dn:]) . r)`` and reads
    ``v_up_h c``.

    Where queries and keys have a norm (``q_rope`` is there), latent and rotary key are those of
    keys without it. Its factor s on the keys ``k x + k_bias``, one over their root mean square or
    standard deviation, is one number for each KV head, or for all, and is cached too. Queries have
    the norm, ``n_h = norm(q x + q_bias)``, and the score is ``scale * s * (n_h . (k_up_h c) +
    RoPE(q_rope_h n_h) . r)``.

    Args:
        geometry: Sizes.
        q: [H, Dn + Dr, E]; with norms [H, Dn, E].
        latent: [R, E].
        k_rope: [Dr, E]; pair i is dims (2i, 2i + 1).
        k_up: [H, Dn, R].
        v_up: [H, Dv, R].
        o: [E, H, Dv].
        q_bias: [H, Dn + Dr]; with norms [H, Dn].
        latent_bias: [R].
        k_rope_bias: [Dr].
        o_bias: [E].
        q_rope: [H, Dr, Dn], only with norms, like all that follow.
        k: [Hkv, Dn, E].
        k_bias: [Hkv, Dn].
        q_norm: As in ``AttentionLayer``.
        q_norm_bias: Same.
        planes: For each pair of the rotary key the RoPE plane of the source whose frequency it
            has; Dr / 2 numbers, in any order and any number of times.
        scale: Factor on the scores.
    """

    geometry: LatentGeometry
    q: Tensor
    latent: Tensor
    k_rope: Tensor
    k_up: Tensor
    v_up: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    latent_bias: Tensor | None = None
    k_rope_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_rope: Tensor | None = None
    k: Tensor | None = None
    k_bias: Tensor | None = None
    q_norm: Tensor | None = None
    q_norm_bias: Tensor | None = None
    planes: tuple[int, ...]
    scale: float
