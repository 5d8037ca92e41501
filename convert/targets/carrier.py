"""Stock classes that can hold the conversion of another family, exactly.

A family whose own class has no KV-head count is written for a class that has one and computes the
same function: its norms absorbed, its tensors renamed, the dims of its heads in another order. One
row for each pair of classes, in the file of the class that results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from convert.config_keys import result_config
from convert.facts import ModelFacts
from convert.families import Family
from convert.families.naming import layer_and_rest
from convert.layer import AttentionLayer
from convert.targets.folds import reorder_heads, with_all_biases
from convert.targets.target import (
    Constant,
    Fold,
    Rewrite,
    Target,
    keep_layer,
    moved_parts,
)
from kvpatch.errors import InputModelError

__all__ = ["Carrier", "carried", "padding_fits", "plain_rope", "reordered", "rope_keys", "rotating"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """One class that can hold conversions of one family.

    Args:
        source: model_type of the family.
        result: Row with which the attention of the result is packed.
        multi_query: Holds a single KV head only.
        exact: Whether the result computes the same function as the source.
        spelling: Config keys of the result by their usual names, where these differ.
        also: Further keys of the result's config, from the source and the KV-head count.
        modules: Modules of the result by those of the source, the latter without the prefix of the
            base model.
        transforms: What is done to tensors, by their names in the source, without that prefix.
        folds: See ``Target``.
        fold: Makes the fold of ``Target``.
        constants: Tensors that the source does not have.
    """

    source: str
    result: Family
    multi_query: bool = False
    exact: Callable[[ModelFacts], bool]
    spelling: Mapping[str, str] = field(default_factory=dict)
    also: Callable[[ModelFacts, int], dict[str, Any]]
    modules: Mapping[str, str]
    transforms: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    folds: tuple[str, ...] = ()
    fold: Callable[[ModelFacts], Fold] = lambda _: keep_layer
    constants: Callable[[ModelFacts], tuple[Constant, ...]] = lambda _: ()


def carried(rows: tuple[Carrier, ...], facts: ModelFacts, *, kv_heads: int) -> list[Target]:
    """The targets among ``rows`` that hold the conversion of a model to ``kv_heads`` exactly."""
    return [
        Target(
            name="native",
            model_type=row.result.model_type,
            architecture=row.result.architecture,
            family=row.result,
            edit=partial(_edit, row=row, facts=facts, kv_heads=kv_heads),
            reads=moved_parts(facts.family, row.result),
            folds=row.folds,
            fold=row.fold(facts),
            rename=partial(_rename, row=row, family=facts.family),
            constants=row.constants(facts),
        )
        for row in rows
        if row.source == facts.family.model_type
        and (kv_heads == 1 or not row.multi_query)
        and row.exact(facts)
    ]


_KEPT = (
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "use_cache",
)
_STATED = ("dtype", "torch_dtype", "transformers_version")


def _edit(
    config: Mapping[str, Any], *, row: Carrier, facts: ModelFacts, kv_heads: int
) -> dict[str, Any]:
    """A config.json of the result's class, with no key of the source's that it does not know."""
    full, kept = facts.config, result_config(facts.config)
    usual = {
        "hidden_size": facts.geometry.hidden,
        "intermediate_size": full.get("intermediate_size") or 4 * facts.geometry.hidden,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.geometry.heads,
        "max_position_embeddings": facts.context,
        "hidden_act": full["hidden_act"],
        "layer_norm_eps": full.get("layer_norm_eps", 1e-5),
        "residual_dropout": full.get("residual_dropout", 0.0),
        "embedding_dropout": full.get("embedding_dropout", 0.0),
        "attention_dropout": full.get("attention_dropout", 0.0),
        "tie_word_embeddings": facts.tied,
    }
    return {
        "architectures": [row.result.architecture],
        "model_type": row.result.model_type,
        **{key: kept[key] for key in _KEPT if key in kept},
        **{row.spelling.get(key, key): value for key, value in usual.items()},
        **row.also(facts, kv_heads),
        **{key: config[key] for key in _STATED if key in config},
    }


def _rename(name: str, *, row: Carrier, family: Family) -> Rewrite:
    layer, bare = None, name.removeprefix(family.base)
    if (place := layer_and_rest(name, family)) is not None:
        layer, rest = place
        bare = f"{family.without_base().layer_prefix}{rest}"
    module, _, leaf = bare.rpartition(".")
    if module not in row.modules:
        raise InputModelError(
            f"{name!r} has no place in a model of class {row.result.architecture}",
            hint="Choose --target kvpatch, or remove it from the checkpoint if nothing reads it.",
        )
    return Rewrite(f"{row.modules[module].format(layer=layer)}.{leaf}", row.transforms.get(bare))


def plain_rope(facts: ModelFacts) -> bool:
    """Whether all layers rotate an even number of dims, without frequency scaling."""
    dims = {rope.dim for rope in facts.ropes} | {facts.geometry.head_dim}
    return all(dim % 2 == 0 for dim in dims) and {r.kind for r in facts.ropes} == {"default"}


def padding_fits(facts: ModelFacts) -> bool:
    """Whether the padding token is in the vocabulary, which some classes demand."""
    padding, vocabulary = facts.config.get("pad_token_id"), facts.config.get("vocab_size")
    if padding is None:
        return True
    return isinstance(padding, int) and isinstance(vocabulary, int) and padding < vocabulary


def reordered(order: Tensor) -> Fold:
    """The fold that puts the dims of query and key heads in ``order`` [D] and adds all biases."""

    def fold(
        layer: AttentionLayer, _: Mapping[str, Tensor]
    ) -> tuple[AttentionLayer, Mapping[str, Tensor]]:
        return with_all_biases(reorder_heads(layer, order)), {}

    return fold


def rotating(part: int, whole: int) -> float:
    """Share of ``whole`` dims that rotate, such that their product rounds down to ``part``."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1)


def rope_keys(theta: float, share: float, *, kind: str = "default") -> dict[str, Any]:
    """RoPE as transformers 5 writes it; the default kind as version 4 does, too."""
    parameters = {"rope_theta": theta, "partial_rotary_factor": share}
    legacy = parameters if kind == "default" else {}
    return {**legacy, "rope_parameters": {"rope_type": kind, **parameters}}
