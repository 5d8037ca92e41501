"""The source's own stock class, with fewer KV heads; and config.json as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from convert.config_keys import result_config
from convert.facts import ModelFacts
from convert.targets.target import Target

__all__ = ["config_json", "same_class", "with_dtype"]


def same_class(facts: ModelFacts, *, kv_heads: int) -> Target | None:
    """The stock class of the source; None where it cannot hold that many KV heads."""
    family = facts.family
    if family.gqa:
        keys: Mapping[str, object] = {"num_key_value_heads": kv_heads}
    elif kv_heads == 1 and family.multi_query:
        keys = family.multi_query
    elif kv_heads == facts.geometry.kv_heads:
        keys = {}
    else:
        return None
    return Target(
        name="native",
        model_type=family.model_type,
        architecture=family.architecture,
        family=family,
        edit=partial(_edit, keys={"architectures": [family.architecture], **keys}),
    )


def _edit(config: Mapping[str, Any], *, keys: Mapping[str, object]) -> dict[str, Any]:
    """The source's config.json with a few new keys."""
    return {**result_config(config), **keys}


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config.json with a new dtype of the weights, under the key that it has for it.

    Args:
        config: The parsed config.json.
        dtype: New dtype, if they were cast.
    """
    edited = dict(config)
    if dtype is not None:
        legacy = "torch_dtype" in edited
        if legacy:
            edited["torch_dtype"] = dtype
        if "dtype" in edited or not legacy:
            edited["dtype"] = dtype
    return edited


def config_json(config: Mapping[str, Any]) -> bytes:
    """``config.json`` as it is written."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
