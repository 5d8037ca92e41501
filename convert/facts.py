"""What config.json and the tensor headers say about a model's attention; no weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from convert.families import Family, family_of
from convert.families.positions import check_positions, layer_ropes, layer_windows
from convert.layer import Geometry, QkNorm, Rope
from kvpatch.errors import InputModelError
from kvpatch.memory import KVCache, multi_head_cache

__all__ = ["ModelFacts", "check_shapes", "read_facts", "with_stored_dtype"]

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_LARGEST = 10**7  # of any count or width; larger ones would only cost time and memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Attention of a model as its config.json describes it.

    Args:
        config: The parsed config.json.
        family: Row of the family table.
        geometry: E, H, Hkv, D, Dv; equal in all layers of the families at hand.
        layers: Number of decoder layers.
        context: Longest sequence the model was made for, in tokens.
        dtype: Name of the weight dtype, as torch spells it.
        ropes: Rotary positions of each layer.
        windows: Sliding window of each layer, None where it sees everything.
        scale: Factor on the scores.
        softcap: Cap of the scores by tanh, or None.
        clip: Clamp on queries, keys and values, or None.
        tied: Whether input and output embeddings are one.
    """

    config: Mapping[str, Any]
    family: Family
    geometry: Geometry
    layers: int
    context: int
    dtype: str
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    scale: float
    softcap: float | None
    clip: float | None
    tied: bool

    def cache(self, *, kv_heads: int | None = None, dtype: str | None = None) -> KVCache:
        """KV cache of this model, or of its conversion to ``kv_heads`` and ``dtype``."""
        return multi_head_cache(
            layers=self.layers,
            kv_heads=self.geometry.kv_heads if kv_heads is None else kv_heads,
            head_dim=self.geometry.head_dim,
            value_dim=self.geometry.value_dim,
            windows=self.windows,
            bytes_per_value=_DTYPE_BYTES[dtype or self.dtype],
        )

    @property
    def qk_norm(self) -> QkNorm | None:
        """Norm of queries and keys, if this model has one."""
        switch = self.family.qk_norm_switch
        return self.family.qk_norm if switch is None or self.config.get(switch) else None

    def legal_kv_heads(self) -> list[int]:
        """KV-head counts that this model can be pooled to."""
        now = self.geometry.kv_heads
        return [n for n in range(1, now) if now % n == 0]


def read_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Interpret a config.json, with the defaults that transformers applies to absent keys.

    Raises:
        InputModelError: If the family is unknown, the model is quantised, or a value makes no
            sense.
    """
    family = family_of(config)
    if quantization := config.get("quantization_config"):
        named = isinstance(quantization, dict) and quantization.get("quant_method")
        raise InputModelError(
            f"the weights are quantised ({named or 'unknown method'!r}); "
            "pooling quantised heads is not meaningful",
            hint="Convert the unquantised checkpoint and quantise the result.",
        )
    if config.get("use_bidirectional_attention"):
        raise InputModelError("config.json has use_bidirectional_attention: not a causal model")
    if config.get("per_layer_config"):
        raise InputModelError("config.json has per_layer_config: layers differ in their attention")
    config = {**family.defaults, **config}
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    kv_heads = _integer(config, "num_key_value_heads", default=heads)
    head_dim = _integer(config, "head_dim", default=hidden // heads)
    layers = _integer(config, "num_hidden_layers")
    if heads % kv_heads:
        raise InputModelError(
            f"config.json: num_key_value_heads {kv_heads} does not divide "
            f"num_attention_heads {heads}"
        )
    check_positions(config, layers)
    geometry = Geometry(
        hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim
    )
    scale = head_dim**-0.5
    if family.scale is not None:
        key, exponent = family.scale
        if not isinstance(config[key], int | float) or config[key] <= 0:
            raise InputModelError(
                f"config.json: {key} must be a positive number, found {config[key]!r}"
            )
        scale = float(config[key]) ** exponent
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix(
        "torch."
    )
    if dtype not in _DTYPE_BYTES:
        raise InputModelError(
            f"config.json: dtype {dtype!r} is not one of {', '.join(_DTYPE_BYTES)}",
            hint="Convert an unquantised checkpoint.",
        )
    return ModelFacts(
        config=config,
        family=family,
        geometry=geometry,
        layers=layers,
        context=_integer(config, "max_position_embeddings", default=2048),
        dtype=dtype,
        ropes=layer_ropes(config, family, layers=layers, head_dim=head_dim),
        windows=layer_windows(config, family, layers=layers),
        scale=scale,
        softcap=config.get("attn_logit_softcapping"),
        clip=config.get("clip_qkv"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def with_stored_dtype(facts: ModelFacts, dtypes: Iterable[torch.dtype]) -> ModelFacts:
    """The facts with the dtype of the weights, where config.json does not state one.

    Args:
        facts: From config.json.
        dtypes: Dtypes of the tensors, in file order.
    """
    stated = facts.config.get("dtype") or facts.config.get("torch_dtype")
    floating = next((dtype for dtype in dtypes if dtype.is_floating_point), None)
    if stated or floating is None:
        return facts
    return dataclasses.replace(facts, dtype=str(floating).removeprefix("torch."))


def check_shapes(facts: ModelFacts, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare config.json with the shapes in the headers, all layers.

    Args:
        facts: From config.json.
        shapes: Shape of every tensor on disk, by name.

    Raises:
        InputModelError: With a table of every attention tensor that is absent or contradicts.
    """
    problems: list[tuple[str, object, object]] = []
    for layer in range(facts.layers):
        prefix = facts.family.layer_prefix.format(layer=layer)
        for projection in facts.family.projections:
            weight = f"{prefix}{projection.name}.weight"
            expected = projection.shape(facts.geometry)
            if shapes.get(weight) != expected:
                problems.append((weight, expected, shapes.get(weight)))
            bias = f"{prefix}{projection.name}.bias"
            if bias in shapes and shapes[bias] != expected[:1]:
                problems.append((bias, expected[:1], shapes[bias]))
    beyond = facts.family.layer_prefix.format(layer=facts.layers)
    problems += [
        (repr(name)[1:-1], f"no layer {facts.layers}", shape)
        for name, shape in shapes.items()
        if name.startswith(beyond)
    ]
    vocabulary = facts.config.get("vocab_size")
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is not None and embedding != (vocabulary, facts.geometry.hidden):
        problems.append(
            ("model.embed_tokens.weight", (vocabulary, facts.geometry.hidden), embedding)
        )
    if not facts.tied and embedding is not None and "lm_head.weight" not in shapes:
        problems.append(("lm_head.weight", "present: tie_word_embeddings is false", None))
    if problems:
        lines = [f"  {n}: config says {want}, file has {have}" for n, want, have in problems[:8]]
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputModelError(
            "config.json contradicts the tensors:\n" + "\n".join(lines) + more,
            hint="Check num_attention_heads, num_key_value_heads, head_dim, num_hidden_layers, "
            "vocab_size and tie_word_embeddings, or download the checkpoint again.",
        )


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:  # null means what the sizes imply, also in transformers
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputModelError(f"config.json: {key} must be a positive integer, found {value!r}")
    if value > _LARGEST:
        raise InputModelError(f"config.json: {key} is {value}, larger than any model")
    return value
