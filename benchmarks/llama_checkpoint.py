"""A random Llama checkpoint of a wanted size, laid out as ``save_pretrained`` does it.

Run by the benchmarks in a process of its own: ``python -m benchmarks.llama_checkpoint OUT GB``.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SHARD_SIZE = "1GB"
STANDARD_DEVIATION = 0.02


def make_checkpoint(folder: Path, least_bytes: int) -> None:
    """Write the smallest whole number of 7B layers that makes ``least_bytes``, shard by shard."""
    model = next(m for m in map(_bare_model, count(1)) if _nbytes(m) >= least_bytes)
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    shards = split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=SHARD_SIZE)
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.filename_to_tensors.items():
        tensors = {name: _random(model.state_dict()[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _bare_model(layers: int) -> LlamaForCausalLM:
    """Llama 2 7B with fewer layers, without data."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=layers,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def _nbytes(model: LlamaForCausalLM) -> int:
    return sum(prod(t.shape) * t.dtype.itemsize for t in model.state_dict().values())


def _random(bare: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers row by row: a whole float32 copy would be twice the tensor."""
    tensor = torch.empty(bare.shape, dtype=bare.dtype)
    for row in tensor:
        row.copy_(torch.randn(row.shape, generator=generator) * STANDARD_DEVIATION)
    return tensor


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), int(float(sys.argv[2]) * 1e9))
