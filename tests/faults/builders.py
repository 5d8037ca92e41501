"""Tiny Llama checkpoints, sound or damaged, written with json, struct and safetensors alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.faults.running import Run, cli, contents

__all__ = [
    "CONFIG",
    "assert_refused",
    "attention",
    "frame",
    "header_of",
    "llama_tensors",
    "replace_header",
    "run_gqa",
    "write_json",
    "write_model",
    "write_shards",
]

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def attention(layer: int, part: str) -> str:
    """Name of the weight of the projection ``q``, ``k``, ``v`` or ``o`` of a layer."""
    return f"model.layers.{layer}.self_attn.{part}_proj.weight"


def llama_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All weights that ``CONFIG`` asks for; small multiples of 1/64, exact in every float dtype."""
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {attention(layer, part): (8, 8) for part in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (12, 8) for name in ("gate", "up")}
        shapes |= {
            f"{prefix}mlp.down_proj.weight": (8, 12),
            f"{prefix}input_layernorm.weight": (8,),
            f"{prefix}post_attention_layernorm.weight": (8,),
        }
    shapes["lm_head.weight"] = (16, 8)
    return {
        name: _pattern(seed, shape).to(dtype) for seed, (name, shape) in enumerate(shapes.items())
    }


def _pattern(seed: int, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    values = (torch.arange(count) * 37 + seed * 11) % 101 - 50
    return (values.to(torch.float64) / 64).reshape(shape)


def write_model(
    folder: Path, tensors: Mapping[str, Tensor] | None = None, **config: object
) -> Path:
    """Write a checkpoint of one file.

    Args:
        folder: Folder to make.
        tensors: Replace or add tensors; those of ``CONFIG`` stay otherwise.
        **config: Replace or add keys of config.json.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**CONFIG, **config})
    everything = {**llama_tensors(), **(tensors or {})}
    save_file(everything, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, *, extra: Mapping[str, Tensor] | None = None) -> Path:
    """Write a checkpoint of two files and an index; ``extra`` lies in the second, unlisted."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG)
    tensors = llama_tensors()
    files: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        files["b.safetensors" if "layers.1." in name else "a.safetensors"][name] = tensor
    weight_map = {name: file for file, content in files.items() for name in content}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    files["b.safetensors"] |= extra or {}
    for file, content in files.items():
        save_file(content, folder / file, metadata={"format": "pt"})
    return folder


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def frame(header: bytes | Mapping[str, object], data: bytes = b"") -> bytes:
    """Bytes of a safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a sound safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def replace_header(file: Path, changes: Mapping[str, object]) -> None:
    """Replace or add entries in the header of a safetensors file; its data stay."""
    header, data = header_of(file.read_bytes())
    file.write_bytes(frame({**header, **changes}, data))


def run_gqa(source: Path, out: Path, *flags: str) -> Run:
    """Convert four KV heads to two."""
    return cli(["gqa", str(source), str(out), "--kv-heads", "2", *flags])


def assert_refused(
    source: Path, *facts: str, flags: Sequence[str] = (), code: int = 3, lines: int = 2
) -> str:
    """Fail unless a conversion ends with one message that states the facts, and leaves no trace.

    Args:
        source: The checkpoint; it must be as it was afterwards.
        *facts: What the message has to say.
        flags: Further flags of ``kvpatch gqa --kv-heads 2``.
        code: Exit code.
        lines: Most lines of the message, with its hint.

    Returns:
        The message.
    """
    work = source.parent / "work"
    work.mkdir()
    before = contents(source)
    run = run_gqa(source, work / "out", *flags)
    assert run.code == code, run.err
    assert run.out == ""
    assert run.err.startswith("error: ")
    assert run.err.count("\n") <= lines, run.err
    for fact in facts:
        assert fact in run.err, run.err
    assert list(work.iterdir()) == [], "output, staging folder or lock is left"
    assert contents(source) == before, "the source was written to"
    return run.err
