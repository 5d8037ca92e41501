"""A Llama checkpoint written with plain torch and safetensors, of any size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["HEADS", "write_llama"]

HEADS = 8


def write_llama(
    folder: Path,
    *,
    layers: int = 4,
    hidden: int = 64,
    inner: int = 96,
    vocab: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of one shard per layer, an index, and side files one folder deep.

    All layers hold the same numbers, so that large ones are made quickly.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.05).to(dtype)

    layer = {
        "input_layernorm.weight": torch.ones(hidden, dtype=dtype),
        "mlp.down_proj.weight": weight(hidden, inner),
        "mlp.gate_proj.weight": weight(inner, hidden),
        "mlp.up_proj.weight": weight(inner, hidden),
        "post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
        **{f"self_attn.{name}_proj.weight": weight(hidden, hidden) for name in "kqvo"},
    }
    files = [
        {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
        for i in range(layers)
    ]
    files[0]["model.embed_tokens.weight"] = weight(vocab, hidden)
    files[-1] |= {
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": weight(vocab, hidden),
    }
    folder.mkdir(parents=True)
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": hidden // HEADS,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    _write_json(folder / "generation_config.json", {"do_sample": False})
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}\n")
    return folder


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
