"""Values that config.json and recipes should not have, and keys of other families."""

from __future__ import annotations

from random import Random
from typing import Any

__all__ = ["FOREIGN", "MODEL_TYPES", "ODD", "ROPES", "near"]

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    7,
    10**6,
    10**7,
    2**31,
    2**63,
    10**30,
    0.0,
    0.5,
    -0.25,
    1.5,
    4.0,
    1e-30,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "8",
    "many",
    [],
    [1],
    ["x"],
    [None, None],
    {},
    {"x": 1},
)

MODEL_TYPES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "olmo",
    "olmo2",
    "phi3",
    "granite",
    "smollm3",
    "glm",
    "helium",
    "starcoder2",
    "gpt2",
    "gpt_bigcode",
    "gptj",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "cohere",
    "deepseek_v3",
    "kvpatch_llama",
    "t5",
    "mamba",
    "",
)

# keys that some family knows, with values that one may have
FOREIGN: dict[str, tuple[Any, ...]] = {
    "_attn_implementation": ("eager", "flash_attention_2", "nonsense"),
    "activation_function": ("gelu_new", "nonsense"),
    "add_cross_attention": (True, False),
    "alibi": (True, False),
    "architectures": (["LlamaModel"], ["T5ForConditionalGeneration"], []),
    "attention_bias": (True, False),
    "attention_dropout": (0.1, 2.0),
    "attention_multiplier": (0.4,),
    "attention_types": ([[["global", "local"], 1]], [[["local"], 10**9]]),
    "attn_config": ({"clip_qkv": 0.7}, {"alibi": False}, {"softmax_scale": 0.4}),
    "attn_logit_softcapping": (0.9, 30.0),
    "auto_map": ({"AutoModelForCausalLM": "modeling_x.X"},),
    "cache_implementation": ("hybrid", "static"),
    "clip_qkv": (0.7, 8),
    "decoder_sparse_step": (1, 2),
    "dtype": ("float16", "bfloat16", "torch.float32", "float8_e4m3fn", "int8", "double"),
    "embedding_multiplier": (12.0,),
    "eos_token_id": (2, [2, 3], 96, 97, 10**6),
    "head_dim": (8, 12, 16, 20, 24),
    "hidden_act": ("silu", "gelu_pytorch_tanh", "nonsense"),
    "initializer_range": (0.02,),
    "intermediate_size": (40, 41),
    "is_encoder_decoder": (True, False),
    "kv_lora_rank": (16,),
    "kv_rope_planes": ([[0], [0]],),
    "kv_source_layers": ([0, 0], [0, 1], [1, 0], [0, 7], [0, "0"], [0, -1]),
    "layer_norm_epsilon": (1e-5,),
    "layer_types": (
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"],
        ["full_attention"] * 9,
        ["full_attention", "nonsense"],
        ["full_attention", None],
        ["chunked_attention", "linear_attention"],
    ),
    "logits_scaling": (4.0,),
    "max_position_embeddings": (64, 8, 1, 10**6),
    "max_window_layers": (0, 1, 5),
    "mlp_bias": (True, False),
    "model_max_length": (64,),
    "multi_query": (True, False),
    "n_embd": (48, 49),
    "n_head": (4, 2, 5),
    "n_layer": (2, 1, 3),
    "n_positions": (64, 8, 10**6),
    "new_decoder_architecture": (True, False),
    "no_rope_layer_interval": (1, 2),
    "no_rope_layers": ([1, 0], [0, 0], [1]),
    "num_experts": (3, 2),
    "num_key_value_heads": (1, 2, 4, 8),
    "num_kv_heads": (1, 4),
    "num_local_experts": (3, 2),
    "pad_token_id": (0, 96, 97, -1),
    "partial_rotary_factor": (0.5, 1.0, 0.3, 1.7),
    "per_layer_config": ({"0": {"head_dim": 8}},),
    "pretraining_tp": (1, 2),
    "q_lora_rank": (16,),
    "qk_layernorm": (True, False),
    "quantization_config": ({"quant_method": "gptq"}, {"bits": 4}),
    "query_pre_attn_scalar": (7, 256),
    "residual_multiplier": (0.3,),
    "rms_norm_eps": (1e-6, 1e-3),
    "rope_interleaved": (True, False),
    "rope_local_base_freq": (1e4, 500),
    "rope_theta": (1e4, 5e5, 17),
    "rotary_dim": (4, 6, 5, 400),
    "rotary_pct": (0.25, 1.0),
    "scale_attn_by_inverse_layer_idx": (True, False),
    "scale_attn_weights": (True, False),
    "sliding_window": (1, 4, 64, 10**6),
    "sliding_window_pattern": (1, 2, 6),
    "text_config": ({"model_type": "llama"},),
    "tie_word_embeddings": (True, False),
    "torch_dtype": ("float16", "bfloat16", "float32"),
    "transformers_version": ("3.0.0", "99.0"),
    "use_bias": (True, False),
    "use_bidirectional_attention": (True, False),
    "use_cache": (True, False),
    "use_qk_norm": (True, False),
    "use_sliding_window": (True, False),
    "vision_config": ({},),
    "vocab_size": (96, 97, 98),
    "window_size": (4, 256),
    "word_embed_proj_dim": (48, 24),
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _longrope(planes: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(planes)],
        "long_factor": [1.0 + 0.5 * i for i in range(planes)],
        "original_max_position_embeddings": 32,
    }


_KINDS: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 17.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    _LLAMA3,
    _YARN,
    *(_longrope(planes) for planes in (2, 4, 6, 8, 10)),
    {**_longrope(6), "type": "su"},
    {"rope_type": "mrope", "mrope_section": [2, 2, 2]},
    {"rope_type": "nonsense"},
    {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
)
ROPES: tuple[dict[str, Any], ...] = (
    *_KINDS,
    *({"full_attention": kind, "sliding_attention": {"rope_theta": 1e4}} for kind in _KINDS[:5]),
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
)


def near(value: Any, random: Random) -> Any:
    """A value beside a valid one, of its type where that has neighbours."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value)))
    if isinstance(value, float):
        return random.choice((0.0, -value, 2 * value, value / 2, value * 1e20, str(value)))
    if isinstance(value, str):
        return random.choice((value + "x", value.upper(), value[:-1], [value]))
    if isinstance(value, list) and value:
        return random.choice((value[:-1], [*value, value[-1]], [*value[:-1], None], value[::-1]))
    if isinstance(value, dict) and value:
        key = random.choice(sorted(value))
        changes = (
            {k: v for k, v in value.items() if k != key},
            value | {key: random.choice(ODD)},
            value | {key: near(value[key], random)},
        )
        return random.choice(changes)
    return random.choice(ODD)
