"""The source's own stock class, with fewer KV heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["edit_config", "index_json"]


def edit_config(config: Mapping[str, Any], *, kv_heads: int, dtype: str | None) -> bytes:
    """The source's config.json with a new KV-head count, all other keys as they were.

    ``auto_map`` goes: the result loads in the stock class, and code of the source would not know
    that its heads were pooled.

    Args:
        config: The parsed config.json, not completed with defaults.
        kv_heads: New ``num_key_value_heads``.
        dtype: New dtype of the weights, if they were cast.
    """
    edited = {key: value for key, value in config.items() if key != "auto_map"}
    edited["num_key_value_heads"] = kv_heads
    if dtype is not None:
        legacy = "torch_dtype" in edited
        if legacy:
            edited["torch_dtype"] = dtype
        if "dtype" in edited or not legacy:
            edited["dtype"] = dtype
    return (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()


def index_json(weight_map: Mapping[str, str], *, parameters: int, size: int) -> bytes:
    """``model.safetensors.index.json`` as transformers writes it, sorted by name."""
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
