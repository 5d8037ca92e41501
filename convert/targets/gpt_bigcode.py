"""GPTBigCode as the class of a result: learned positions and a single KV head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from convert.facts import ModelFacts
from convert.families.multi_head import GPT_BIGCODE as ROW
from convert.layer import AttentionLayer
from convert.targets.carrier import Carrier
from convert.targets.folds import with_all_biases
from convert.targets.target import Constant

__all__ = ["GPT_BIGCODE"]

_SPELLING = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
    "residual_dropout": "resid_pdrop",
    "embedding_dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
}


def _config(facts: ModelFacts, _: int) -> dict[str, Any]:
    switch = facts.family.scale_switch
    scaled = switch is None or bool(facts.config[switch])
    return {"multi_query": True, "scale_attn_weights": scaled}


def _add_biases(
    layer: AttentionLayer, _: Mapping[str, Tensor]
) -> tuple[AttentionLayer, Mapping[str, Tensor]]:
    return with_all_biases(layer), {}


def _absent_in_opt(facts: ModelFacts) -> tuple[Constant, ...]:
    """Biases and norm weights of the OPT models that were trained without."""
    biases, norms = [], []
    for layer in range(facts.layers):
        prefix = f"transformer.h.{layer}"
        biases += [f"{prefix}.mlp.c_fc.bias", f"{prefix}.mlp.c_proj.bias"]
        norms += [f"{prefix}.ln_1", f"{prefix}.ln_2"]
    hidden, inner = facts.geometry.hidden, facts.config["intermediate_size"]
    constants: list[Constant] = []
    if not facts.config["enable_bias"]:
        constants += [Constant(n, (inner if "c_fc" in n else hidden,), 0.0) for n in biases]
    if not facts.config["layer_norm_elementwise_affine"]:
        for norm in (*norms, "transformer.ln_f"):
            constants += [
                Constant(f"{norm}.weight", (hidden,), 1.0),
                Constant(f"{norm}.bias", (hidden,), 0.0),
            ]
    return tuple(constants)


GPT_BIGCODE = (
    Carrier(
        source="gpt2",
        result=ROW,
        multi_query=True,
        exact=lambda facts: (
            not facts.config.get("scale_attn_by_inverse_layer_idx")
            and not facts.config.get("reorder_and_upcast_attn")
        ),
        spelling=_SPELLING,
        also=_config,
        modules={
            "wte": "transformer.wte",
            "wpe": "transformer.wpe",
            "ln_f": "transformer.ln_f",
            "lm_head": "lm_head",
            "h.{layer}.ln_1": "transformer.h.{layer}.ln_1",
            "h.{layer}.ln_2": "transformer.h.{layer}.ln_2",
            "h.{layer}.mlp.c_fc": "transformer.h.{layer}.mlp.c_fc",
            "h.{layer}.mlp.c_proj": "transformer.h.{layer}.mlp.c_proj",
        },
        transforms={  # Conv1D holds [in, out]
            "h.{layer}.mlp.c_fc.weight": Tensor.t,
            "h.{layer}.mlp.c_proj.weight": Tensor.t,
        },
    ),
    Carrier(
        source="opt",
        result=ROW,
        multi_query=True,
        exact=lambda facts: not facts.config.get("_remove_final_layer_norm"),
        spelling=_SPELLING,
        also=_config,
        modules={
            "decoder.embed_tokens": "transformer.wte",
            "decoder.embed_positions": "transformer.wpe",
            "decoder.final_layer_norm": "transformer.ln_f",
            "lm_head": "lm_head",
            "decoder.layers.{layer}.self_attn_layer_norm": "transformer.h.{layer}.ln_1",
            "decoder.layers.{layer}.final_layer_norm": "transformer.h.{layer}.ln_2",
            "decoder.layers.{layer}.fc1": "transformer.h.{layer}.mlp.c_fc",
            "decoder.layers.{layer}.fc2": "transformer.h.{layer}.mlp.c_proj",
        },
        # OPT keeps the first two positions for padding
        transforms={"decoder.embed_positions.weight": lambda table: table[2:]},
        fold=lambda _: _add_biases,
        constants=_absent_in_opt,
    ),
)
