"""A model of the shape of Llama-2-7B and what the converter makes of it, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from kvpatch.memory import KVCache, latent_cache, multi_head_cache
from kvpatch.models import configuration_kvpatch, modeling_kvpatch

__all__ = ["LLAMA", "TINY", "Design", "Shape", "designs"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model, and of its conversions."""

    layers: int
    heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    kv_heads: int
    rank: int
    rope_dim: int
    contexts: tuple[int, ...]


LLAMA = Shape(32, 32, 128, 11008, 32000, 8, 512, 64, (8192, 32768))
TINY = Shape(2, 4, 16, 64, 50, 2, 32, 16, (24,))


@dataclass(frozen=True, slots=True)
class Design:
    """A model and its cache."""

    model_class: Any
    config: Any
    cache: KVCache


def designs(shape: Shape) -> dict[str, Design]:
    """The source and its conversions, by name."""
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.heads * shape.head_dim,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": 2 * max(shape.contexts) + 64,
    }
    pairs = [layer - layer % 2 for layer in range(shape.layers)]
    latent = DeepseekV3Config(
        **sizes,
        num_key_value_heads=shape.heads,
        q_lora_rank=None,
        kv_lora_rank=shape.rank,
        qk_rope_head_dim=shape.rope_dim,
        qk_nope_head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        first_k_dense_replace=shape.layers,
    )
    grouped = {
        name: Design(
            LlamaForCausalLM,
            LlamaConfig(**sizes, num_key_value_heads=heads, head_dim=shape.head_dim),
            multi_head_cache(layers=shape.layers, kv_heads=heads, head_dim=shape.head_dim),
        )
        for name, heads in (
            ("MHA", shape.heads),
            (f"GQA-{shape.kv_heads}", shape.kv_heads),
            ("MQA", 1),
        )
    }
    return {
        **grouped,
        "CLA2": Design(
            modeling_kvpatch.KvpatchLlamaForCausalLM,
            configuration_kvpatch.KvpatchLlamaConfig(
                **sizes,
                num_key_value_heads=shape.heads,
                head_dim=shape.head_dim,
                kv_source_layers=pairs,
            ),
            multi_head_cache(
                layers=shape.layers, kv_heads=shape.heads, head_dim=shape.head_dim, sources=pairs
            ),
        ),
        f"MLA {shape.rank}+{shape.rope_dim}": Design(
            DeepseekV3ForCausalLM,
            latent,
            latent_cache(layers=shape.layers, rank=shape.rank, rope_dim=shape.rope_dim),
        ),
    }
