"""The published models that the recipes convert: true configs and headers, and no weights.

A header-only checkpoint has every tensor of the published one under its name, in its dtype and
shape, but the data are a hole in the file: 17 GB of Gemma take a few kB of disk. That is enough
for everything that works from headers alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["ITEM_BYTES", "PUBLISHED", "PublishedModel", "write_headers_only"]

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_DTYPE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_SHARD_BYTES = 5 * 10**9

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PublishedModel:
    """What stands in the repository of a model.

    ``parameters`` counts all numbers in its weight files, buffers included, as the Hub does.
    ``buffers`` are tensors of the files that today's model class no longer has.
    """

    config: dict[str, Any]
    parameters: int
    buffers: Shapes = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return self.config["torch_dtype"]

    @property
    def head_dim(self) -> int:
        implied = self.config["hidden_size"] // self.config["num_attention_heads"]
        return self.config.get("head_dim", implied)

    def shapes(self) -> Shapes:
        """Shape of every tensor in the files, from the stock class and the known buffers."""
        config = AutoConfig.for_model(**self.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        return shapes | self.buffers


def write_headers_only(model: PublishedModel, folder: Path) -> Path:
    """Write config, index and shards whose bodies are holes; return the folder."""
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    item = ITEM_BYTES[model.dtype]
    shards = list(_split(model.shapes(), _SHARD_BYTES // item))
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_hollow_file(folder / file, shapes, model.dtype)
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": item * model.parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _split(shapes: Shapes, most: int) -> Iterator[Shapes]:
    """Cut into files of at most ``most`` numbers, in order."""
    part: Shapes = {}
    for name, shape in shapes.items():
        if part and sum(map(prod, part.values())) + prod(shape) > most:
            yield part
            part = {}
        part[name] = shape
    yield part


def _write_hollow_file(path: Path, shapes: Shapes, dtype: str) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": PublishedModel(
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vocab_size": 32000,
        },
        parameters=6_738_417_664,
        buffers={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in range(32)},
    ),
    "Qwen/Qwen1.5-7B": PublishedModel(
        config={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        parameters=7_721_324_544,
    ),
    "allenai/OLMo-1B-hf": PublishedModel(
        config={
            "architectures": ["OlmoForCausalLM"],
            "model_type": "olmo",
            "clip_qkv": None,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "vocab_size": 50304,
        },
        parameters=1_176_764_416,
    ),
    "HuggingFaceTB/SmolLM2-1.7B": PublishedModel(
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "rope_theta": 130000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 49152,
        },
        parameters=1_711_376_384,
    ),
    "google/gemma-7b": PublishedModel(
        config={
            "architectures": ["GemmaForCausalLM"],
            "model_type": "gemma",
            "head_dim": 256,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 256000,
        },
        parameters=8_537_680_896,
    ),
}
