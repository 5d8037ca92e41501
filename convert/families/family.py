"""What a row of the family table holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from convert.layer import Geometry, QkNorm

__all__ = ["SEPARATE", "Family", "Only", "Part", "Projection", "Windows"]

Part = Literal["q", "k", "v", "o"]


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear map on disk, ``<layer prefix><name>.weight`` and perhaps ``.bias``.

    Args:
        name: Module name inside the layer.
        parts: The canonical parts its output rows hold, in order. ``o`` stands alone and holds
            its heads in columns.
        blocks: Equal blocks of rows, each of which holds its share of the heads of every part;
            ``kv_heads``: one block for each KV head.
        transposed: The weight is [in, out] (Conv1D).
    """

    name: str
    parts: tuple[Part, ...]
    blocks: int | Literal["kv_heads"] = 1
    transposed: bool = False

    def spans(self, geometry: Geometry) -> list[tuple[Part, int, int]]:
        """(part, heads, width of a head) in row order."""
        size = {
            "q": (geometry.heads, geometry.head_dim),
            "k": (geometry.kv_heads, geometry.head_dim),
            "v": (geometry.kv_heads, geometry.value_dim),
            "o": (geometry.heads, geometry.value_dim),
        }
        return [(part, *size[part]) for part in self.parts]

    def block_count(self, geometry: Geometry) -> int:
        """Number of blocks of rows."""
        return geometry.kv_heads if self.blocks == "kv_heads" else self.blocks

    def shapes(self, geometry: Geometry) -> tuple[tuple[int, int], tuple[int]]:
        """Shapes of the weight and of the bias on disk."""
        width = sum(heads * dim for _, heads, dim in self.spans(geometry))
        out, into = (geometry.hidden, width) if self.parts == ("o",) else (width, geometry.hidden)
        return ((into, out) if self.transposed else (out, into)), (out,)


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
            layers from ``max_window_layers`` on; ``nope``: those without RoPE; ``local``: those
            that ``attention_layers`` or ``attention_types`` calls local; ``never``: none.
        every: Period of ``pattern``.
        key: Config key that overrides the period, if the family has one.
        switch: Config key that must be true for windows to be in use, if the family has one.
        cached: Whether the cache of the stock class drops what a window has passed.
    """

    rule: Literal["all", "pattern", "from_layer", "nope", "local", "never"]
    every: int = 0
    key: str | None = None
    switch: str | None = None
    cached: bool = True


@dataclass(frozen=True, slots=True)
class Only:
    """The one value of a config key with which a family is supported; it may be absent or null.

    Args:
        key: The config key.
        value: Its value.
        same_as: Config key whose value it must have instead.
        otherwise: What a model with another value is, for the error.
    """

    key: str
    value: object = None
    same_as: str | None = None
    otherwise: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one model_type lays out its attention.

    Args:
        model_type: As in config.json.
        architecture: The stock causal-LM class.
        gqa: Whether that class also holds fewer KV heads than query heads, as many as
            ``num_key_value_heads`` says.
        multi_query: Config keys with which it holds a single KV head, if it does that alone.
        keys: Names of a config key in config.json, in the order of precedence, where the family
            does not have the usual name alone; a dot leads into a nested object.
        only: Values outside of which the family is not supported.
        projections: The linear maps of the attention.
        base: Prefix of the base model on disk; empty for a checkpoint that was saved without.
        layer_prefix: Name of a decoder layer on disk, with that prefix.
        embedding: Name of the input embedding on disk.
        heads: Names that the output embedding can have on disk.
        buffers: Modules or tensors of a layer that old checkpoints store and no class reads.
        qk_norm: Kind of query/key norm, if the family can have one. A checkpoint that lacks the
            tensors has none.
        qk_norm_switch: Config key that must be true for it, if the family has one.
        q_norm: Name of the query norm's weight; ``{head}`` where each head has its own tensor.
        k_norm: Same for the key norm.
        positions: ``rope``; ``learned`` embeddings, added to the input of the first layer; or
            ``alibi``, a bias on the scores that depends on the distance and the query head. The
            last two leave queries and keys as they are: no layer has a RoPE.
        tabled: Whether the class computes its positions, but keeps a table of only as many as
            config.json says.
        interleaved: RoPE pairs neighbouring dims.
        partial: Share of the head that rotates, where the config does not say; None where all of
            it does, whatever ``partial_rotary_factor`` says.
        rotary_dim: Config key of the number of dims that rotate, where that is how it is given.
        rope_kinds: Kinds of RoPE that its class knows, and the kind that each of them is; None for
            all that transformers has.
        theta: Base of the RoPE frequencies, where the config does not say.
        local_theta: Base in sliding layers, where these rotate on their own.
        windows: Layers with a sliding window, where the config does not list them.
        scale: Config key of the score scale, as (key, exponent), or the scale itself. Where it is
            None or the key is absent, ``head_dim ** -0.5``.
        scale_switch: Config key that turns that scale off (to 1) if false, if the family has one.
        layer_scale: Config key that divides the scale by the layer's number, counted from one, if
            true.
        attention_residual: How the output projection reaches the residual stream: ``direct``, or
            ``normed`` where a norm stands between them.
        residual_multiplier: Config key of the factor on the way there, if the family has one.
        nope_every: Every n-th layer has no RoPE, where the config does not list them; 0 for none.
        defaults: What transformers assumes for config keys that are absent.
    """

    model_type: str
    architecture: str
    gqa: bool = True
    multi_query: Mapping[str, object] = field(default_factory=dict)
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only: tuple[Only, ...] = ()
    projections: tuple[Projection, ...] = SEPARATE
    base: str = "model."
    layer_prefix: str = "model.layers.{layer}."
    embedding: str = "model.embed_tokens.weight"
    heads: tuple[str, ...] = ("lm_head.weight",)
    buffers: tuple[str, ...] = ()
    qk_norm: QkNorm | None = None
    qk_norm_switch: str | None = None
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    positions: Literal["rope", "learned", "alibi"] = "rope"
    tabled: bool = False
    interleaved: bool = False
    partial: float | None = None
    rotary_dim: str | None = None
    rope_kinds: Mapping[str, str] | None = None
    theta: float = 10000.0
    local_theta: float | None = None
    windows: Windows = Windows("never")
    scale: tuple[str, float] | float | None = None
    scale_switch: str | None = None
    layer_scale: str | None = None
    attention_residual: Literal["direct", "normed"] = "direct"
    residual_multiplier: str | None = None
    nope_every: int = 0
    defaults: Mapping[str, object] = field(default_factory=dict)

    @property
    def attention(self) -> str:
        """Module name of the attention inside a layer."""
        return self.projections[-1].name.rpartition(".")[0]

    @property
    def ends(self) -> bool:
        """Whether there is no position beyond those that config.json says."""
        return self.tabled or self.positions == "learned"

    def without_base(self) -> Family:
        """The row for a checkpoint of the base model, saved without its prefix."""
        return dataclasses.replace(
            self,
            base="",
            layer_prefix=self.layer_prefix.removeprefix(self.base),
            embedding=self.embedding.removeprefix(self.base),
        )

    def spelling(self, key: str, config: Mapping[str, Any]) -> str:
        """Name of a config key as the config.json at hand spells it."""
        names = self.keys.get(key) or (key,)
        return next((name for name in names if _lookup(config, name) is not None), names[0])

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with the defaults of transformers, and every key under its usual name."""
        full = {**self.defaults, **config}
        for key, names in self.keys.items():
            found = [v for v in (_lookup(full, name) for name in names) if v is not None]
            full.pop(key, None)
            if found:
                full[key] = found[0]
        return full


def _lookup(config: Mapping[str, Any], name: str) -> Any:
    """Value of a key, or of a dotted path into nested objects; None where it is absent."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
