"""Phi as the class of a result: any number of KV heads.

Its attention stands beside the feed-forward block, behind one norm for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convert.facts import ModelFacts
from convert.families import FAMILIES
from convert.layer import AttentionLayer
from convert.targets.carrier import (
    Carrier,
    padding_fits,
    plain_rope,
    reordered,
    rope_keys,
    rotating,
)
from convert.targets.folds import (
    absorb_norm,
    absorb_norm_into_qkv,
    half_split_order,
    with_all_biases,
)
from convert.targets.target import Constant, Fold
from kvpatch.errors import InputModelError

__all__ = ["PHI"]


def _config(facts: ModelFacts, kv_heads: int) -> dict[str, Any]:
    rope = facts.ropes[0]
    return {
        "num_key_value_heads": kv_heads,
        "qk_layernorm": False,
        **rope_keys(rope.theta, rotating(rope.dim, facts.geometry.head_dim)),
    }


def _half_split(facts: ModelFacts) -> Fold:
    return reordered(half_split_order(facts.ropes[0].dim, facts.geometry.head_dim))


_NEOX_FOLDS = (
    "input_layernorm.weight",
    "input_layernorm.bias",
    "post_attention_layernorm.weight",
    "post_attention_layernorm.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_h_to_4h.bias",
)


def _absorb_norms(
    layer: AttentionLayer, others: Mapping[str, Tensor]
) -> tuple[AttentionLayer, Mapping[str, Tensor]]:
    """GPT-NeoX normalises the input of either branch with weights of its own.

    Both branches absorb theirs, and the bare norm is the same one.

    Raises:
        InputModelError: If the checkpoint lacks one of the tensors.
    """
    if absent := [name for name in _NEOX_FOLDS if name not in others]:
        raise InputModelError(
            f"a layer of the checkpoint has no {', '.join(absent)}",
            hint="Download the checkpoint again.",
        )
    folded = absorb_norm_into_qkv(
        layer, others["input_layernorm.weight"], others["input_layernorm.bias"]
    )
    weight, bias = absorb_norm(
        others["mlp.dense_h_to_4h.weight"],
        others["mlp.dense_h_to_4h.bias"],
        others["post_attention_layernorm.weight"],
        others["post_attention_layernorm.bias"],
    )
    return with_all_biases(folded), {"mlp.fc1.weight": weight, "mlp.fc1.bias": bias}


def _bare_norms(facts: ModelFacts) -> tuple[Constant, ...]:
    size = (facts.geometry.hidden,)
    return (
        Constant("lm_head.bias", (facts.config["vocab_size"],), 0.0),
        *(
            Constant(f"model.layers.{layer}.input_layernorm.{leaf}", size, value)
            for layer in range(facts.layers)
            for leaf, value in (("weight", 1.0), ("bias", 0.0))
        ),
    )


_SPELLING = {"residual_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop"}
_GPT_MODULES = {
    "wte": "model.embed_tokens",
    "ln_f": "model.final_layernorm",
    "lm_head": "lm_head",
    "h.{layer}.ln_1": "model.layers.{layer}.input_layernorm",
    "h.{layer}.mlp.fc_in": "model.layers.{layer}.mlp.fc1",
    "h.{layer}.mlp.fc_out": "model.layers.{layer}.mlp.fc2",
}

PHI = (
    Carrier(
        source="gpt_neox",
        result=FAMILIES["phi"],
        exact=lambda facts: (
            bool(facts.config["use_parallel_residual"])
            and plain_rope(facts)
            and padding_fits(facts)
        ),
        spelling=_SPELLING,
        also=_config,
        modules={
            "embed_in": "model.embed_tokens",
            "final_layer_norm": "model.final_layernorm",
            "embed_out": "lm_head",
            "lm_head": "lm_head",
            "layers.{layer}.mlp.dense_4h_to_h": "model.layers.{layer}.mlp.fc2",
        },
        folds=_NEOX_FOLDS,
        fold=lambda _: _absorb_norms,
        constants=_bare_norms,
    ),
    *(
        Carrier(
            source=source,
            result=FAMILIES["phi"],
            exact=padding_fits,
            spelling=_SPELLING,
            also=_config,
            modules=_GPT_MODULES,
            fold=_half_split,
        )
        for source in ("gptj", "codegen")
    ),
)
