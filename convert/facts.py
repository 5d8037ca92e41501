"""What config.json and the tensor headers say about a model's attention; no weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from convert.families import Family, Only, family_of
from convert.families.naming import layer_and_rest
from convert.families.positions import check_positions, layer_ropes, layer_windows
from convert.families.values import check_values
from convert.layer import Geometry, QkNorm, Rope
from kvpatch.errors import InputModelError, UnsupportedModelError
from kvpatch.memory import KVCache, multi_head_cache
from kvpatch.models import FAMILIES as KVPATCH_FAMILIES
from kvpatch.models import PREFIX

__all__ = [
    "PREDICTING",
    "ModelFacts",
    "Problem",
    "check_shapes",
    "contradiction",
    "has_latents",
    "read_facts",
    "with_stored_dtype",
]

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PREDICTING = "num_nextn_predict_layers"  # layers for speculation, which no class here runs
Problem = tuple[str, object, object]
_MOST_LAYERS = 10**4
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
        sources: For each layer the one whose keys and values it reads, mostly itself.
        scales: Factor on the scores of each layer.
        softcap: Cap of the scores by tanh, or None.
        clip: Clamp on queries, keys and values, or None.
        tied: Whether input and output embeddings are one.
        residual_multiplier: Factor on the attention's output where it joins the residual stream.
    """

    config: Mapping[str, Any]
    family: Family
    geometry: Geometry
    layers: int
    context: int
    dtype: str
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    sources: tuple[int, ...]
    scales: tuple[float, ...]
    softcap: float | None
    clip: float | None
    tied: bool
    residual_multiplier: float

    def cache(
        self,
        *,
        kv_heads: int | None = None,
        sources: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> KVCache:
        """KV cache of this model, or of its conversion to ``kv_heads``, ``sources``, ``dtype``."""
        return multi_head_cache(
            layers=self.layers,
            kv_heads=self.geometry.kv_heads if kv_heads is None else kv_heads,
            head_dim=self.geometry.head_dim,
            value_dim=self.geometry.value_dim,
            sources=self.sources if sources is None else sources,
            windows=self.windows if self.family.windows.cached else (None,) * self.layers,
            bytes_per_value=self.bytes_per_value(dtype),
        )

    def bytes_per_value(self, dtype: str | None = None) -> int:
        """Width of a cached number, in ``dtype`` or in that of the weights."""
        return _DTYPE_BYTES[dtype or self.dtype]

    @property
    def norm_eps(self) -> float:
        """Epsilon of the model's norms."""
        keys = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
        return next((float(self.config[k]) for k in keys if self.config.get(k) is not None), 1e-5)

    @property
    def qk_norm(self) -> QkNorm | None:
        """Norm of queries and keys, if this model has one."""
        switch = self.family.qk_norm_switch
        return self.family.qk_norm if switch is None or self.config.get(switch) else None

    @property
    def key_scales(self) -> int:
        """Factors that the norm of keys comes to for each token: one for all KV heads or for each.

        None, so 0, if there is no norm, or one that adds a bias besides.
        """
        row = KVPATCH_FAMILIES.get(self.family.model_type.removeprefix(PREFIX))
        if self.qk_norm is None or row is None or row.key_scale is None:
            return 0
        return 1 if self.qk_norm.layout == "full" else self.geometry.kv_heads

    def legal_kv_heads(self) -> list[int]:
        """KV-head counts that this model can be pooled to."""
        now = self.geometry.kv_heads
        return [n for n in range(1, now) if now % n == 0]


def has_latents(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes latent attention, of transformers or of kvpatch."""
    return config.get("kv_lora_rank") is not None


def read_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Interpret a config.json, with the defaults that transformers applies to absent keys.

    Raises:
        UnsupportedModelError: If the family is unknown, or the model is quantised.
        InputModelError: If a value makes no sense.
    """
    family = family_of(config)
    if quantization := config.get("quantization_config"):
        named = isinstance(quantization, dict) and quantization.get("quant_method")
        raise UnsupportedModelError(
            f"the weights are quantised ({named or 'unknown method'!r}); "
            "pooling quantised heads is not meaningful",
            hint="Convert the unquantised checkpoint and quantise the result.",
        )
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            "config.json has use_bidirectional_attention: not a causal model"
        )
    if config.get("per_layer_config"):
        raise UnsupportedModelError(
            "config.json has per_layer_config: layers differ in their attention"
        )
    check_values(config, family)
    full = family.completed(config)
    for rule in family.only:
        _check_only(rule, full, family.spelling(rule.key, config))
    _check_foreign(config, family)

    def integer(key: str, default: int | None = None, *, most: int = _LARGEST) -> int:
        return _integer(full.get(key), family.spelling(key, config), default, most)

    heads, hidden = integer("num_attention_heads"), integer("hidden_size")
    # a class without KV heads of its own reads neither of these keys
    single = bool(family.multi_query) and bool(full.get("multi_query"))
    own = 1 if single else heads
    kv_heads = integer("num_key_value_heads", heads) if family.gqa else own
    head_dim = integer("head_dim", hidden // heads) if family.gqa else hidden // heads
    layers = integer("num_hidden_layers", most=_MOST_LAYERS)
    _check_blocks(family, heads, hidden, full.get("head_dim"))
    if heads % kv_heads:
        raise InputModelError(
            f"config.json: num_key_value_heads {kv_heads} does not divide "
            f"num_attention_heads {heads}"
        )
    check_positions(full, family, layers)
    geometry = Geometry(
        hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim
    )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in _DTYPE_BYTES:
        raise InputModelError(
            f"config.json: dtype {dtype!r} is not one of {', '.join(_DTYPE_BYTES)}",
            hint="Convert an unquantised checkpoint.",
        )
    return ModelFacts(
        config=full,
        family=family,
        geometry=geometry,
        layers=layers,
        context=integer("max_position_embeddings", 2048),
        dtype=dtype,
        ropes=layer_ropes(full, family, layers=layers, head_dim=head_dim),
        windows=layer_windows(full, family, layers=layers),
        sources=_sources(full, layers),
        scales=_scales(full, family, config, head_dim=head_dim, layers=layers),
        softcap=full.get("attn_logit_softcapping"),
        clip=full.get("clip_qkv"),
        tied=bool(full.get("tie_word_embeddings", False)),
        residual_multiplier=_residual_multiplier(full, family),
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
        shapes: Shape of every tensor, by the names of the family table.

    Raises:
        InputModelError: With a table of every attention tensor that is absent or contradicts.
    """
    family, hidden = facts.family, facts.geometry.hidden
    problems: list[Problem] = []
    for layer in range(facts.layers):
        prefix = family.layer_prefix.format(layer=layer)
        for projection in family.projections:
            if facts.sources[layer] != layer and set(projection.parts) <= {"k", "v"}:
                continue
            expected, expected_bias = projection.shapes(facts.geometry)
            weight, bias = f"{prefix}{projection.name}.weight", f"{prefix}{projection.name}.bias"
            if shapes.get(weight) != expected:
                problems.append((weight, expected, shapes.get(weight)))
            if bias in shapes and shapes[bias] != expected_bias:
                problems.append((bias, expected_bias, shapes[bias]))
    problems += _beyond(facts, shapes)
    vocabulary = facts.config.get("vocab_size")
    embedding = shapes.get(family.embedding)
    if embedding != (vocabulary, hidden):
        problems.append((family.embedding, (vocabulary, hidden), embedding))
    head = next((name for name in family.heads if name in shapes), None)
    if head is not None and shapes[head] != (vocabulary, hidden):
        problems.append((head, (vocabulary, hidden), shapes[head]))
    if head is None and not facts.tied:
        problems.append((family.heads[0], "present: tie_word_embeddings is false", None))
    if problems:
        raise contradiction(problems)


def _beyond(facts: ModelFacts, shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    """Tensors of layers that config.json does not count.

    Layers that predict further tokens follow those of the model, which does not run them.
    """
    predicting = facts.config.get(PREDICTING)
    first = facts.layers + (predicting if type(predicting) is int and predicting > 0 else 0)
    places = {name: layer_and_rest(name, facts.family) for name in shapes}
    return [
        (repr(name)[1:-1], f"no layer {place[0]}", shapes[name])
        for name, place in places.items()
        if place is not None and place[0] >= first
    ]


def contradiction(problems: Sequence[Problem]) -> InputModelError:
    """The error for tensors that are not what config.json says: name, expected, found."""
    lines = [f"  {n}: config says {want}, file has {have}" for n, want, have in problems[:8]]
    more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
    return InputModelError(
        "config.json contradicts the tensors:\n" + "\n".join(lines) + more,
        hint="Compare the sizes in config.json (heads, head_dim, layers, experts, "
        "vocab_size, intermediate_size, tie_word_embeddings) with those of the model, or download "
        "the checkpoint again.",
    )


def _sources(full: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    listed = full.get("kv_source_layers")
    if listed is None:
        return tuple(range(layers))
    if (
        not isinstance(listed, list)
        or len(listed) != layers
        or any(
            type(s) is not int or not 0 <= s <= i or listed[s] != s for i, s in enumerate(listed)
        )
    ):
        raise InputModelError(
            f"config.json: kv_source_layers must list {layers} layers, each a layer before or "
            f"itself that reads no other, found {listed!r:.200}"
        )
    return tuple(listed)


def _check_foreign(config: Mapping[str, Any], family: Family) -> None:
    """Refuse keys with which kvpatch or transformers would take a model for another."""
    foreign = (
        "kv_lora_rank",
        "kv_rope_planes",
        "kv_source_layers",
        "qk_nope_head_dim",
        "v_head_dim",
    )
    keys = [key for key in foreign if config.get(key) is not None]
    if keys and not family.model_type.startswith(PREFIX):
        raise InputModelError(
            f"config.json has {' and '.join(keys)}, which a {family.model_type} model has not",
            hint="Remove it, or take the config.json that belongs to the weights.",
        )


def _check_blocks(family: Family, heads: int, hidden: int, head_dim: int | None) -> None:
    """Heads share the hidden width where a class reads no head_dim, and blocks share the heads."""
    if not family.gqa and hidden % heads:
        raise InputModelError(f"config.json: {heads} heads do not divide the hidden size {hidden}")
    if not family.gqa and head_dim not in {None, hidden // heads}:
        raise InputModelError(
            f"config.json: head_dim is {head_dim}, but heads of a {family.model_type} model are "
            f"{hidden // heads} wide: hidden size {hidden}, {heads} heads"
        )
    for projection in family.projections:
        if isinstance(projection.blocks, int) and heads % projection.blocks:
            raise InputModelError(
                f"config.json: {heads} heads do not fill the {projection.blocks} blocks of "
                f"{projection.name} in a {family.model_type} model"
            )


def _check_only(rule: Only, full: Mapping[str, Any], name: str) -> None:
    value = full.get(rule.key)
    wanted = rule.value if rule.same_as is None else full.get(rule.same_as)
    if value is None or value == wanted:
        return
    raise UnsupportedModelError(
        f"config.json: {name} is {value!r}: {rule.otherwise} is not supported",
        hint=f"Of model_type {full['model_type']!r}, only models with {name} = {wanted!r} are.",
    )


def _scales(
    full: Mapping[str, Any],
    family: Family,
    config: Mapping[str, Any],
    *,
    head_dim: int,
    layers: int,
) -> tuple[float, ...]:
    """Factor on the scores of every layer."""
    scale = head_dim**-0.5
    if isinstance(family.scale, float):
        scale = family.scale
    elif family.scale is not None:
        key, exponent = family.scale
        value = full.get(key)
        if value is not None or key in family.defaults:
            if not isinstance(value, int | float) or value <= 0:
                raise InputModelError(
                    f"config.json: {family.spelling(key, config)} must be a positive number, "
                    f"found {value!r}"
                )
            scale = float(value) ** exponent
    if family.scale_switch is not None and not full.get(family.scale_switch):
        scale = 1.0
    by_layer = family.layer_scale is not None and full.get(family.layer_scale)
    return tuple(scale / (layer + 1 if by_layer else 1) for layer in range(layers))


def _residual_multiplier(full: Mapping[str, Any], family: Family) -> float:
    value = 1.0 if family.residual_multiplier is None else full[family.residual_multiplier]
    if isinstance(value, bool) or not isinstance(value, int | float):
        key = family.residual_multiplier
        raise InputModelError(f"config.json: {key} must be a number, found {value!r}")
    return float(value)


def _integer(value: Any, name: str, default: int | None, most: int) -> int:
    if value is None:  # null means what the sizes imply, also in transformers
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputModelError(f"config.json: {name} must be a positive integer, found {value!r}")
    if value > most:
        raise InputModelError(f"config.json: {name} is {value}, larger than any model")
    return value
