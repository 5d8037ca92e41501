"""Starcoder2 as the class of a result: any number of KV heads, attention before feed-forward."""

from __future__ import annotations

from typing import Any

from convert.facts import ModelFacts
from convert.families import FAMILIES
from convert.targets.carrier import (
    Carrier,
    padding_fits,
    plain_rope,
    reordered,
    rope_keys,
    rotating,
)
from convert.targets.folds import proportional_order
from convert.targets.target import Fold

__all__ = ["STARCODER2"]


def _config(facts: ModelFacts, kv_heads: int) -> dict[str, Any]:
    """Starcoder2 pairs all dims of a head.

    ``proportional`` RoPE gives the first pairs the frequencies ``theta ** (-2i / D)``, and the
    others zero. The base is chosen to make that ``theta ** (-2i / rotary_dim)`` of the source.
    """
    rope, dim = facts.ropes[0], facts.geometry.head_dim
    kind = "default" if rope.dim == dim else "proportional"
    return {
        "num_key_value_heads": kv_heads,
        "use_bias": True,
        "sliding_window": None,
        **rope_keys(rope.theta ** (dim / rope.dim), rotating(rope.dim, dim), kind=kind),
    }


def _all_pairs(facts: ModelFacts) -> Fold:
    return reordered(proportional_order(facts.ropes[0].dim, facts.geometry.head_dim))


STARCODER2 = (
    Carrier(
        source="gpt_neox",
        result=FAMILIES["starcoder2"],
        exact=lambda facts: (
            not facts.config["use_parallel_residual"] and plain_rope(facts) and padding_fits(facts)
        ),
        spelling={"layer_norm_eps": "norm_epsilon"},
        also=_config,
        modules={
            "embed_in": "model.embed_tokens",
            "final_layer_norm": "model.norm",
            "embed_out": "lm_head",
            "lm_head": "lm_head",
            "layers.{layer}.input_layernorm": "model.layers.{layer}.input_layernorm",
            "layers.{layer}.post_attention_layernorm": (
                "model.layers.{layer}.post_attention_layernorm"
            ),
            "layers.{layer}.mlp.dense_h_to_4h": "model.layers.{layer}.mlp.c_fc",
            "layers.{layer}.mlp.dense_4h_to_h": "model.layers.{layer}.mlp.c_proj",
        },
        fold=_all_pairs,
    ),
)
