"""What a row of the family table holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from convert.layer import Geometry, QkNorm

__all__ = ["Family", "Part", "Projection", "Windows"]

Part = Literal["q", "k", "v", "o"]


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear map on disk, ``<layer prefix><name>.weight`` and perhaps ``.bias``.

    Args:
        name: Module name inside the layer.
        parts: The canonical parts its output rows hold, in order. ``o`` stands alone and holds
            its heads in columns.
    """

    name: str
    parts: tuple[Part, ...]

    def spans(self, geometry: Geometry) -> list[tuple[Part, int, int]]:
        """(part, heads, width of a head) in row order."""
        size = {
            "q": (geometry.heads, geometry.head_dim),
            "k": (geometry.kv_heads, geometry.head_dim),
            "v": (geometry.kv_heads, geometry.value_dim),
            "o": (geometry.heads, geometry.value_dim),
        }
        return [(part, *size[part]) for part in self.parts]

    def shape(self, geometry: Geometry) -> tuple[int, int]:
        """Shape of the weight, [out, in]."""
        width = sum(heads * dim for _, heads, dim in self.spans(geometry))
        return (geometry.hidden, width) if self.parts == ("o",) else (width, geometry.hidden)


SEPARATE = (
    Projection("self_attn.q_proj", ("q",)),
    Projection("self_attn.k_proj", ("k",)),
    Projection("self_attn.v_proj", ("v",)),
    Projection("self_attn.o_proj", ("o",)),
)


@dataclass(frozen=True, slots=True)
class Windows:
    """Which layers have a sliding window, where config.json gives no ``layer_types``.

    Args:
        rule: ``all`` layers; ``pattern``: every layer but each ``every``-th; ``from_layer``: the
            layers from ``max_window_layers`` on; ``nope``: those without RoPE; ``never``: none.
        every: Period of ``pattern``.
        key: Config key that overrides the period, if the family has one.
        switch: Config key that must be true for windows to be in use, if the family has one.
    """

    rule: Literal["all", "pattern", "from_layer", "nope", "never"]
    every: int = 0
    key: str | None = None
    switch: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one model_type lays out its attention.

    Args:
        model_type: As in config.json.
        architecture: The stock causal-LM class, which also holds the GQA form.
        projections: The linear maps of the attention.
        layer_prefix: Name of a decoder layer on disk.
        qk_norm: Kind of query/key norm, if the family can have one. A checkpoint that lacks the
            tensors has none.
        qk_norm_switch: Config key that must be true for it, if the family has one.
        q_norm: Name of the query norm's weight; ``{head}`` where each head has its own tensor.
        k_norm: Same for the key norm.
        interleaved: RoPE pairs neighbouring dims.
        partial: Share of the head that rotates, where the config does not say; None where all of
            it does, whatever ``partial_rotary_factor`` says.
        theta: Base of the RoPE frequencies, where the config does not say.
        local_theta: Base in sliding layers, where these rotate on their own.
        windows: Layers with a sliding window, where the config does not list them.
        scale: Config key of the score scale, as (key, exponent); else ``head_dim ** -0.5``.
        nope_every: Every n-th layer has no RoPE, where the config does not list them; 0 for none.
        defaults: What transformers assumes for config keys that are absent.
    """

    model_type: str
    architecture: str
    projections: tuple[Projection, ...] = SEPARATE
    layer_prefix: str = "model.layers.{layer}."
    qk_norm: QkNorm | None = None
    qk_norm_switch: str | None = None
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    interleaved: bool = False
    partial: float | None = None
    theta: float = 10000.0
    local_theta: float | None = None
    windows: Windows = Windows("never")
    scale: tuple[str, float] | None = None
    nope_every: int = 0
    defaults: Mapping[str, object] = field(default_factory=dict)
