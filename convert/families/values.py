"""What each value of config.json must be, as data: one rule for a key, whatever the family.

transformers refuses a config.json with a value of another type when it loads the model. These are
its rules, of all classes in the table, so that a model which would not load is not converted; and
ranges outside of which the classes compute nothing but NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.families.family import Family
from kvpatch.errors import InputModelError
from kvpatch.models import PREFIX

__all__ = ["COUNT", "NUMBER", "POSITIVE", "SHARE", "SWITCH", "VALUES", "Kind", "check_values"]

_LARGEST = 2**31  # of any integer; larger ones overflow somewhere


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value.

    Args:
        words: What such a value is, for messages.
        holds: Whether a value is one.
    """

    words: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Refuse another value.

        Raises:
            InputModelError: Naming the key, what was expected and what was found.
        """
        if not self.holds(value):
            raise InputModelError(f"config.json: {name} must be {self.words}, found {value!r:.200}")


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_LARGEST <= value < _LARGEST


def _real(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _number(value: Any) -> bool:
    return _integer(value) or _real(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


COUNT = Kind("a positive integer", lambda v: _integer(v) and v > 0)
NUMBER = Kind("a number", _number)
POSITIVE = Kind("a positive number", lambda v: _number(v) and v > 0)
SHARE = Kind("a number above 0 and up to 1", lambda v: _number(v) and 0 < v <= 1)
SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
_INTEGER = Kind("an integer", _integer)
_WHOLE = Kind("an integer of 0 or more", lambda v: _integer(v) and v >= 0)
_CUT = Kind("a positive number with a decimal point", lambda v: _real(v) and v > 0)
_SMALL = Kind("a number of 0 or more with a decimal point", lambda v: _real(v) and v >= 0)
_SPREAD = Kind("a number from 0 to 1 with a decimal point", lambda v: _real(v) and 0 <= v <= 1)
_FACTOR = Kind("a number with a decimal point", _real)
_RATE = Kind("a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1)
_NAME = Kind("text", lambda v: isinstance(v, str))
_NAMES = Kind("a list of texts", _texts)
_OBJECT = Kind("an object", lambda v: isinstance(v, dict))
_INTEGERS = Kind("a list of integers", lambda v: isinstance(v, list) and all(map(_integer, v)))
_TOKENS = Kind("a token id or a list of them", lambda v: _integer(v) or _INTEGERS.holds(v))

_KEYS: Mapping[Kind, str] = {
    COUNT: "d_model expansion_ratio ffn_dim ffn_hidden_size head_dim hidden_size intermediate_size "
    "max_position_embeddings max_seq_len moe_intermediate_size n_ctx n_embd n_head n_heads n_inner "
    "n_layer n_layers n_positions no_rope_layer_interval num_attention_heads num_experts "
    "num_experts_per_tok num_heads num_hidden_layers num_key_value_heads num_kv_heads num_layers "
    "num_ln_in_parallel_attn num_local_experts original_max_position_embeddings pretraining_tp "
    "query_pre_attn_scalar shared_expert_intermediate_size sliding_window_pattern vocab_size "
    "window_size word_embed_proj_dim decoder_sparse_step",
    _WHOLE: "max_window_layers sliding_window",
    _INTEGER: "bos_token_id pad_token_id",
    _TOKENS: "eos_token_id",
    SWITCH: "add_cross_attention alibi apply_residual_connection_post_layernorm attention_bias "
    "bias do_layer_norm_before enable_bias is_encoder_decoder layer_norm_elementwise_affine "
    "learned_pos_emb mlp_bias multi_query new_decoder_architecture no_bias norm_topk_prob "
    "output_router_logits parallel_attn prefix_lm qk_layernorm qk_ln qkv_bias "
    "reorder_and_upcast_attn scale_attn_by_inverse_layer_idx scale_attn_weights slow_but_exact "
    "summary_proj_to_labels summary_use_proj tie_word_embeddings use_bias "
    "use_bidirectional_attention use_cache use_parallel_residual use_qk_norm use_qkv_bias "
    "use_sliding_window",
    _CUT: "attn_logit_softcapping clip_qkv final_logit_softcapping logit_scale",
    _SMALL: "init_std layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon rms_norm_eps "
    "router_aux_loss_coef router_jitter_noise",
    _SPREAD: "initializer_range",
    _FACTOR: "embedding_fraction",
    POSITIVE: "attention_multiplier logits_scaling rope_local_base_freq rope_theta rotary_emb_base "
    "softmax_scale",
    NUMBER: "embedding_multiplier residual_multiplier",
    SHARE: "partial_rotary_factor rotary_pct",
    _RATE: "attention_dropout attn_pdrop dropout emb_pdrop embd_pdrop embed_dropout "
    "embedding_dropout hidden_dropout layerdrop resid_dropout resid_pdrop residual_dropout "
    "summary_first_dropout",
    _NAME: "activation activation_function hidden_act hidden_activation init_device norm_type "
    "summary_activation summary_type transformers_version",
    _NAMES: "architectures layer_types",
    _INTEGERS: "mlp_only_layers no_rope_layers",
    _OBJECT: "attn_config id2label label2id rope_parameters rope_scaling",
}
VALUES: Mapping[str, Kind] = {key: kind for kind, keys in _KEYS.items() for key in keys.split()}

# keys of (nearly) all classes that take no null, and the classes that do
_NEVER_NULL: Mapping[str, tuple[str, ...]] = {
    "attention_bias": (),
    "attention_dropout": ("cohere", "falcon", "gemma2", "gemma3_text", "glm", "llama", "phi"),
    "hidden_act": (),
    "initializer_range": (),
    "intermediate_size": ("gpt_neo",),
    "is_encoder_decoder": (),
    "max_position_embeddings": (),
    "rms_norm_eps": (),
    "tie_word_embeddings": (),
    "use_cache": ("ernie4_5",),
    "vocab_size": (),
}
# the others by class; elsewhere, null stands for what a class does anyway
_NEVER_NULL_IN: Mapping[str, str] = {
    "llama": "mlp_bias",
    "mistral": "num_key_value_heads",
    "mixtral": "num_experts_per_tok num_key_value_heads num_local_experts output_router_logits "
    "router_aux_loss_coef router_jitter_noise",
    "qwen2": "max_window_layers use_sliding_window",
    "qwen2_moe": "decoder_sparse_step max_window_layers moe_intermediate_size norm_topk_prob "
    "num_experts num_experts_per_tok num_key_value_heads output_router_logits qkv_bias "
    "router_aux_loss_coef shared_expert_intermediate_size use_sliding_window",
    "qwen3": "head_dim max_window_layers use_sliding_window",
    "qwen3_moe": "decoder_sparse_step moe_intermediate_size norm_topk_prob num_experts "
    "num_experts_per_tok num_key_value_heads output_router_logits router_aux_loss_coef "
    "use_sliding_window",
    "gemma": "head_dim num_key_value_heads",
    "gemma2": "head_dim hidden_activation num_key_value_heads query_pre_attn_scalar",
    "gemma3_text": "head_dim hidden_activation num_key_value_heads query_pre_attn_scalar",
    "olmoe": "norm_topk_prob num_experts num_experts_per_tok output_router_logits "
    "router_aux_loss_coef",
    "phi": "embd_pdrop layer_norm_eps qk_layernorm resid_pdrop",
    "phi3": "embd_pdrop original_max_position_embeddings resid_pdrop",
    "stablelm": "hidden_dropout layer_norm_eps num_key_value_heads qk_layernorm "
    "use_parallel_residual use_qkv_bias",
    "starcoder2": "embedding_dropout norm_epsilon num_key_value_heads residual_dropout use_bias",
    "granite": "attention_multiplier embedding_multiplier logits_scaling mlp_bias "
    "residual_multiplier",
    "smollm3": "mlp_bias no_rope_layer_interval use_sliding_window",
    "glm4": "head_dim num_key_value_heads",
    "nemotron": "mlp_bias norm_eps",
    "helium": "head_dim mlp_bias num_key_value_heads",
    "gpt2": "activation_function add_cross_attention attn_pdrop embd_pdrop layer_norm_epsilon "
    "n_positions reorder_and_upcast_attn resid_pdrop scale_attn_by_inverse_layer_idx "
    "scale_attn_weights summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj",
    "gpt_neo": "activation_function embed_dropout layer_norm_epsilon resid_dropout window_size",
    "gptj": "activation_function attn_pdrop embd_pdrop layer_norm_epsilon n_positions resid_pdrop",
    "codegen": "activation_function attn_pdrop embd_pdrop layer_norm_epsilon n_ctx n_positions "
    "resid_pdrop",
    "gpt_neox": "hidden_dropout layer_norm_eps use_parallel_residual",
    "persimmon": "hidden_dropout layer_norm_eps qk_layernorm",
    "opt": "activation_function do_layer_norm_before dropout enable_bias ffn_dim init_std "
    "layer_norm_elementwise_affine layerdrop",
    "bloom": "apply_residual_connection_post_layernorm hidden_dropout layer_norm_epsilon "
    "pretraining_tp slow_but_exact",
    "mpt": "emb_pdrop embedding_fraction expansion_ratio init_device layer_norm_epsilon "
    "learned_pos_emb max_seq_len no_bias norm_type resid_pdrop",
    "cohere": "layer_norm_eps logit_scale",
    "falcon": "layer_norm_epsilon",
}


def check_values(config: Mapping[str, Any], family: Family) -> None:
    """Refuse values of another type or range than their key has, also of keys that others read.

    Args:
        config: The parsed config.json.
        family: Its row of the table.

    Raises:
        InputModelError: Naming the key, what was expected and what was found.
    """
    inner = config.get("attn_config")
    for path, table in (("", config), ("attn_config.", inner if isinstance(inner, dict) else {})):
        for key, value in table.items():
            kind = VALUES.get(key)
            if kind is not None and not (value is None and _may_be_null(key, family)):
                kind.check(path + key, value)
    used = config.get("num_experts_per_tok") or 0
    there = config.get("num_local_experts") or config.get("num_experts") or used
    if used > there:
        raise InputModelError(f"config.json: num_experts_per_tok is {used}, of {there} experts")


def _may_be_null(key: str, family: Family) -> bool:
    name = family.model_type.removeprefix(PREFIX)
    if key in _NEVER_NULL:
        return name in _NEVER_NULL[key]
    return key not in _NEVER_NULL_IN.get(name, "").split()
