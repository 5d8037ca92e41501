"""Pooling KV heads the usual way: load the model, average, save it again.

Run by the benchmarks in a process of its own: ``python -m benchmarks.usual_way SRC OUT KV_HEADS``.
It is written for clarity and uses transformers and plain torch alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


def convert(source: Path, out: Path, kv_heads: int) -> None:
    """Mean-pool ``k_proj`` and ``v_proj`` of a Llama checkpoint without biases."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            pooled = pool(projection.weight.data, kv_heads, layer.self_attn.head_dim)
            projection.weight = nn.Parameter(pooled)
            projection.out_features = len(pooled)
    model.config = AutoConfig.from_pretrained(source, num_key_value_heads=kv_heads)
    model.save_pretrained(out)


def pool(weight: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """[Hkv * D, E] -> [kv_heads * D, E], averaged in float32 and rounded once."""
    heads = weight.float().reshape(kv_heads, -1, head_dim, weight.shape[1])
    return heads.mean(1).reshape(kv_heads * head_dim, -1).to(weight.dtype)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
