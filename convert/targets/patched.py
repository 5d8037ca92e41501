"""The classes of kvpatch, which hold any number of KV heads and layers that share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from convert.config_keys import result_config
from convert.facts import ModelFacts
from convert.families import Family
from convert.families.separate import separate
from convert.targets.target import Rewrite, Target, moved_parts
from kvpatch.models import FAMILIES, PREFIX, auto_map, class_names

__all__ = ["patched_class"]


def patched_class(
    facts: ModelFacts, *, kv_heads: int, kv_source_layers: Sequence[int] | None
) -> Target | None:
    """The kvpatch class of the source's family; None where there is none.

    Names and tensors outside the attention stay those of the stock class.

    Args:
        facts: The source.
        kv_heads: KV heads of every layer that has its own.
        kv_source_layers: For each layer the one whose keys and values it reads; None if its own.
    """
    source = facts.family
    if source.model_type not in FAMILIES:
        return None
    family = separate(source)
    return Target(
        name="kvpatch",
        model_type=family.model_type,
        architecture=family.architecture,
        family=family,
        edit=partial(_edit, family=source, kv_heads=kv_heads, sources=kv_source_layers),
        reads=moved_parts(source, family),
        rename=partial(_rename, family=source),
    )


def _edit(
    config: Mapping[str, Any], *, family: Family, kv_heads: int, sources: Sequence[int] | None
) -> dict[str, Any]:
    edited = {
        **result_config(config),
        "model_type": PREFIX + family.model_type,
        "architectures": [class_names(family.model_type)["AutoModelForCausalLM"]],
        "auto_map": auto_map(family.model_type),
        "num_key_value_heads": kv_heads,
    }
    return edited if sources is None else {**edited, "kv_source_layers": list(sources)}


def _rename(name: str, *, family: Family) -> Rewrite:
    # transformers renames an output embedding while loading, for its own classes alone
    return Rewrite("lm_head.weight" if name in family.heads else name)
