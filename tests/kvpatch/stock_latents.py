"""Tiny stock MLA models, and how to run them in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache

from kvpatch.attention import unfused
from kvpatch.models import absorbed_kvpatch
from tests.families import tiny
from tests.families.stock import Float64, make

__all__ = [
    "LAYERS",
    "MODELS",
    "PLAIN",
    "SIZES",
    "attentions",
    "count_absorbed_calls",
    "generate",
    "stepwise",
    "stock_model",
]

SIZES: Mapping[str, Any] = {
    **tiny.SIZES,
    "kv_lora_rank": 12,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
_EXPERTS = {"n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_DENSE = {"first_k_dense_replace": 2, "n_routed_experts": 3, "n_group": 1, "topk_group": 1}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
_COMPRESSED = {"q_lora_rank": 14, "attention_bias": True, "rope_parameters": _YARN}

# one of each class as it comes, and one with all that its attention can have besides
MODELS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": _DENSE,
    "deepseek_v2:compressed": {**_DENSE, **_COMPRESSED},
    "deepseek_v3": _DENSE,
    "deepseek_v3:compressed": {**_DENSE, **_COMPRESSED, "rope_interleave": False},
    "youtu": {},
    "youtu:compressed": {**_COMPRESSED, "rope_interleave": False},
    "minicpm3": {},
    "minicpm3:compressed": _COMPRESSED,
    "glm4_moe_lite": {**_EXPERTS, "mlp_layer_types": ["dense", "dense"]},
    "glm4_moe_lite:compressed": {
        **_EXPERTS,
        **_COMPRESSED,
        "mlp_layer_types": ["dense", "dense"],
        "rope_interleave": True,
    },
}
PLAIN = [name for name in MODELS if ":" not in name]
LAYERS = 2


def stock_model(name: str, implementation: str = "eager") -> Any:
    """A tiny stock model in float64, the same one at every call."""
    model = make(name, {**SIZES, **MODELS[name]}).double()
    model.set_attn_implementation(implementation)
    return model


def count_absorbed_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A list that gets the queries and keys of every call of the absorbed form, in order."""
    calls: list[tuple[int, int]] = []
    genuine = absorbed_kvpatch.absorbed_attention

    def counting(
        query_latent: Tensor, query_rope: Tensor, cached: Tensor, *rest: Any, **how: Any
    ) -> Any:
        calls.append((query_latent.shape[2], cached.shape[2]))
        return genuine(query_latent, query_rope, cached, *rest, **how)

    monkeypatch.setattr(unfused, "absorbed_attention", counting)
    return calls


@torch.no_grad()
def stepwise(model: Any, ids: Tensor, cache: Cache, steps: list[int], /, **how: Any) -> Tensor:
    """Logits of all tokens, so many at a time."""
    with Float64():
        parts = [
            model(part, past_key_values=cache, use_cache=True, **how).logits
            for part in ids.split(steps, dim=1)
        ]
    return torch.cat(parts, 1)


def generate(model: Any, ids: Tensor, **how: Any) -> list[list[int]]:
    how = {"attention_mask": torch.ones_like(ids), "use_cache": True, **how}
    with Float64():
        out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **how)
    return out.tolist()


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]
