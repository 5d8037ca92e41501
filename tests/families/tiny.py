"""Tiny models of every family, as data: the settings that differ from ``SIZES``.

The first model of a family is close to its defaults; the others switch on what it can have besides
(biases, query/key norms, clipping, windows, tied or untied embeddings). Head widths differ from
``hidden_size / num_attention_heads`` in the families that allow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["GROUPED", "MODELS", "SIZES", "attention", "family", "settings"]

SIZES: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# families whose class has no KV-head count, with the place of their attention modules
_MULTI_HEAD = {
    "gpt2": "transformer.h.{layer}.attn",
    "gpt_neo": "transformer.h.{layer}.attn.attention",
    "gptj": "transformer.h.{layer}.attn",
    "codegen": "transformer.h.{layer}.attn",
    "gpt_neox": "gpt_neox.layers.{layer}.attention",
    "persimmon": "model.layers.{layer}.self_attn",
    "opt": "model.decoder.layers.{layer}.self_attn",
    "bloom": "transformer.h.{layer}.self_attention",
    "mpt": "transformer.blocks.{layer}.attn",
    "falcon": "transformer.h.{layer}.self_attention",
}

_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_RW = {"alibi": True, "multi_query": False, "parallel_attn": False}
_SWITCHED_WINDOW = {"use_sliding_window": True, "sliding_window": 4}

# model name -> settings; the family is the part of the name before the colon
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"head_dim": 20},
    "llama:bias-tied": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 20, "sliding_window": None},
    "mistral:window": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 3},
    "mixtral:window": {"num_local_experts": 3, "sliding_window": 4, "head_dim": 16},
    "qwen2": {},
    "qwen2:window-tied": {**_SWITCHED_WINDOW, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 20},
    "qwen2_moe:window": {
        **_EXPERTS,
        **_SWITCHED_WINDOW,
        "shared_expert_intermediate_size": 20,
        "num_hidden_layers": 3,
    },
    "qwen3": {"head_dim": 16},
    "qwen3:bias-window": {
        **_SWITCHED_WINDOW,
        "head_dim": 20,
        "attention_bias": True,
        "max_window_layers": 1,
    },
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
    "qwen3_moe:bias-window": {**_EXPERTS, **_SWITCHED_WINDOW, "attention_bias": True},
    "gemma": {"head_dim": 16},
    "gemma:bias-untied": {"head_dim": 20, "attention_bias": True, "tie_word_embeddings": False},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 4,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 0.9,
    },
    "gemma2:bias-nocap": {
        "head_dim": 16,
        "sliding_window": 4,
        "attention_bias": True,
        "attn_logit_softcapping": None,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 4,
        "query_pre_attn_scalar": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text:bias-untied": {
        "head_dim": 20,
        "sliding_window": 4,
        "num_hidden_layers": 3,
        "sliding_window_pattern": 3,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "olmo": {},
    "olmo:bias-clip": {"attention_bias": True, "clip_qkv": 0.7},
    "olmo2": {},
    "olmo2:bias-tied": {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    "olmo3": {"sliding_window": 4, "num_hidden_layers": 4},
    "olmo3:bias": {
        "sliding_window": 4,
        "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "olmoe:bias-clip": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "clip_qkv": 0.7,
    },
    "phi": {},
    "phi:norm-tied": {"hidden_size": 64, "qk_layernorm": True, "tie_word_embeddings": True},
    "phi3": {},
    "phi3:window-partial": {"hidden_size": 64, "sliding_window": 4, "partial_rotary_factor": 0.5},
    "stablelm": {"hidden_size": 64},
    "stablelm:norm-bias": {
        "hidden_size": 64,
        "qk_layernorm": True,
        "use_qkv_bias": True,
        "use_parallel_residual": True,
    },
    "cohere": {},
    "cohere:norm-bias-untied": {
        "use_qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "starcoder2": {},
    "starcoder2:window-nobias-untied": {
        "sliding_window": 4,
        "use_bias": False,
        "tie_word_embeddings": False,
    },
    "granite": {"attention_multiplier": 0.4},
    "granite:bias-tied": {
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "smollm3": {"num_hidden_layers": 4},
    "smollm3:bias-window-untied": {
        **_SWITCHED_WINDOW,
        "no_rope_layers": [0, 1],
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "glm": {"head_dim": 16},
    "glm:nobias-tied": {"head_dim": 12, "attention_bias": False, "tie_word_embeddings": True},
    "glm4": {"head_dim": 16},
    "glm4:nobias-tied": {"head_dim": 12, "attention_bias": False, "tie_word_embeddings": True},
    "nemotron": {"head_dim": 20},
    "nemotron:bias-tied": {"attention_bias": True, "tie_word_embeddings": True},
    "helium": {"head_dim": 12},
    "helium:bias-tied": {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    "ernie4_5": {"head_dim": 16},
    "ernie4_5:bias-untied": {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False},
    "gpt2": {},
    "gpt2:scaled-untied": {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "gptj:tied": {"rotary_dim": 12, "tie_word_embeddings": True},
    "codegen": {"rotary_dim": 4},
    "codegen:tied": {"num_attention_heads": 8, "rotary_dim": 4, "tie_word_embeddings": True},
    "gpt_neox": {"hidden_size": 64},
    "gpt_neox:sequential-nobias-tied": {
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 1.0},
    },
    "persimmon": {},
    "persimmon:nonorm-tied": {"qk_layernorm": False, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 40},
    "opt:nobias-untied": {"ffn_dim": 40, "enable_bias": False, "tie_word_embeddings": False},
    "bloom": {},
    "bloom:untied": {"tie_word_embeddings": False},
    "mpt": {"max_seq_len": 64},
    "mpt:clip-scale-untied": {
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.4},
        "tie_word_embeddings": False,
    },
    "falcon": {**_RW},
    "falcon:bias-untied": {**_RW, "bias": True, "tie_word_embeddings": False},
}


def family(name: str) -> str:
    """The model_type of a model in ``MODELS``."""
    return name.partition(":")[0]


def settings(name: str) -> dict[str, Any]:
    """All settings of a model in ``MODELS``, by config key."""
    sizes = {**SIZES, **MODELS[name]}
    if family(name) in _MULTI_HEAD:
        del sizes["num_key_value_heads"]
    return sizes


def attention(model_type: str) -> str:
    """Name of the attention module of layer ``{layer}``."""
    return _MULTI_HEAD.get(model_type, "model.layers.{layer}.self_attn")


GROUPED = tuple(name for name in MODELS if family(name) not in _MULTI_HEAD)
