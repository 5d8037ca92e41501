"""The table: one row per model_type.

The rows here are those whose stock class has a KV-head count of its own; the others are in
``convert/families/multi_head.py``. Facts are those of transformers 5.23 (configuration and
modeling files of each model_type).
"""

from __future__ import annotations

from collections.abc import Mapping

from convert.families.family import SEPARATE, Family, Projection, Windows
from convert.families.multi_head import GPT_BIGCODE, MULTI_HEAD
from convert.families.separate import separate
from convert.layer import QkNorm
from kvpatch.errors import UnsupportedModelError
from kvpatch.models import PREFIX

__all__ = ["FAMILIES", "family_of"]

_DENSE_OUTPUT = (*SEPARATE[:3], Projection("self_attn.dense", ("o",)))
_FUSED_QKV = (Projection("self_attn.qkv_proj", ("q", "k", "v")), SEPARATE[3])
_SHARED_RMS = QkNorm("shared", "rms")
_FULL_RMS = QkNorm("full", "rms")

_ROWS = (
    Family(model_type="llama", architecture="LlamaForCausalLM"),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        windows=Windows("all"),
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        theta=1e6,
        windows=Windows("all"),
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8},
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        windows=Windows("from_layer", switch="use_sliding_window"),
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        windows=Windows("pattern", every=2, switch="use_sliding_window"),
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 16,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        qk_norm=_SHARED_RMS,
        windows=Windows("from_layer", switch="use_sliding_window"),
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        qk_norm=_SHARED_RMS,
        windows=Windows("all", switch="use_sliding_window"),
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
        },
    ),
    Family(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        defaults={
            "max_position_embeddings": 8192,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        windows=Windows("pattern", every=2),
        scale=("query_pre_attn_scalar", -0.5),
        attention_residual="normed",
        defaults={
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        theta=1e6,
        local_theta=10000.0,
        qk_norm=QkNorm("shared", "rms_plus_one"),
        windows=Windows("pattern", every=6, key="sliding_window_pattern"),
        scale=("query_pre_attn_scalar", -0.5),
        attention_residual="normed",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
        },
    ),
    Family(model_type="olmo", architecture="OlmoForCausalLM"),
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        qk_norm=_FULL_RMS,
        attention_residual="normed",
    ),
    Family(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        keys={"rope_local_base_freq": ()},
        theta=500000.0,
        local_theta=500000.0,
        qk_norm=_FULL_RMS,
        windows=Windows("pattern", every=4),
        attention_residual="normed",
        defaults={"sliding_window": 4096},
    ),
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        qk_norm=_FULL_RMS,
        defaults={"max_position_embeddings": 4096},
    ),
    Family(
        model_type="phi",
        architecture="PhiForCausalLM",
        projections=_DENSE_OUTPUT,
        qk_norm=QkNorm("shared", "layer"),
        qk_norm_switch="qk_layernorm",
        q_norm="self_attn.q_layernorm.weight",
        k_norm="self_attn.k_layernorm.weight",
        partial=0.5,
    ),
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        projections=_FUSED_QKV,
        partial=1.0,
        rope_kinds={"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")},
        windows=Windows("all"),
        defaults={"max_position_embeddings": 4096},
    ),
    Family(
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        qk_norm=QkNorm("per_head", "layer"),
        qk_norm_switch="qk_layernorm",
        q_norm="self_attn.q_layernorm.norms.{head}.weight",
        k_norm="self_attn.k_layernorm.norms.{head}.weight",
        partial=0.25,
        defaults={"max_position_embeddings": 4096, "num_key_value_heads": 32},
    ),
    Family(
        model_type="cohere",
        architecture="CohereForCausalLM",
        theta=500000.0,
        qk_norm=QkNorm("per_head", "layer"),
        qk_norm_switch="use_qk_norm",
        interleaved=True,
        defaults={"max_position_embeddings": 8192, "tie_word_embeddings": True},
    ),
    Family(
        model_type="starcoder2",
        architecture="Starcoder2ForCausalLM",
        windows=Windows("all"),
        defaults={
            "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        model_type="granite",
        architecture="GraniteForCausalLM",
        scale=("attention_multiplier", 1.0),
        residual_multiplier="residual_multiplier",
        defaults={"attention_multiplier": 1.0, "residual_multiplier": 1.0},
    ),
    Family(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        theta=2e6,
        windows=Windows("nope", switch="use_sliding_window"),
        nope_every=4,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        model_type="glm",
        architecture="GlmForCausalLM",
        interleaved=True,
        partial=0.5,
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128},
    ),
    Family(
        model_type="glm4",
        architecture="Glm4ForCausalLM",
        interleaved=True,
        partial=0.5,
        attention_residual="normed",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128},
    ),
    Family(
        model_type="nemotron",
        architecture="NemotronForCausalLM",
        partial=0.5,
        defaults={"max_position_embeddings": 4096},
    ),
    Family(
        model_type="helium",
        architecture="HeliumForCausalLM",
        theta=100000.0,
        interleaved=True,
        defaults={"max_position_embeddings": 4096, "num_key_value_heads": 20, "head_dim": 128},
    ),
    Family(
        model_type="ernie4_5",
        architecture="Ernie4_5ForCausalLM",
        theta=500000.0,
        interleaved=True,
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
)

FAMILIES: Mapping[str, Family] = {row.model_type: row for row in (*_ROWS, *MULTI_HEAD)}

_LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "youtu", "minicpm3", "glm4_moe_lite")


def family_of(config: Mapping[str, object]) -> Family:
    """Row of the table for a config.json.

    Raises:
        UnsupportedModelError: If the model_type is absent, not a decoder-only text model, already
            latent, or not in the table.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        if model_type in FAMILIES:
            return FAMILIES[model_type]
        if model_type == GPT_BIGCODE.model_type:
            return GPT_BIGCODE
        stock = model_type.removeprefix(PREFIX)
        if stock != model_type and stock in FAMILIES:
            return separate(FAMILIES[stock])
    known = ", ".join(sorted(FAMILIES))
    how = f"Supported: {known}. To add one, add a row to convert/families/table.py."
    if not isinstance(model_type, str):
        raise UnsupportedModelError("config.json has no model_type", hint=how)
    if model_type in _LATENT:
        raise UnsupportedModelError(f"{model_type} caches a latent already (MLA)", hint=how)
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"{model_type!r} is an encoder-decoder; only decoder-only models are converted",
            hint=how,
        )
    for key in ("text_config", "vision_config"):
        if key in config:
            raise UnsupportedModelError(
                f"{model_type!r} wraps a text model ({key} in config.json)",
                hint=f"Save its language model as a checkpoint of its own first. {how}",
            )
    raise UnsupportedModelError(f"model_type {model_type!r} is not supported", hint=how)
