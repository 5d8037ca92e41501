"""Tiny stock models whose lossless latent form DeepSeek's class holds, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from convert.checkpoint.reader import read_json
from convert.facts import ModelFacts
from convert.layer import AttentionLayer, LatentLayer
from convert.methods.latent import embedded
from convert.targets.deepseek import deepseek_class
from convert.targets.target import Target
from tests.families.stock import Float64, full_logits, load, make, random_ids
from tests.families.tiny import SIZES, family
from tests.helpers import assert_close
from tests.targets.applying import apply, facts_of

__all__ = [
    "BIASED",
    "FORMS",
    "PLAIN",
    "PLAINEST",
    "SOURCES",
    "assert_same",
    "real_float64",
    "save",
    "target_of",
    "write_latent",
    "written_as",
]

_READS = frozenset({"q", "k", "v", "o"})
_BASE = {**SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}

# source -> settings; the family is the part before the colon
SOURCES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"head_dim": 20},
    "llama:bias-tied": {"attention_bias": True, "tie_word_embeddings": True},
    "llama:eps": {"rms_norm_eps": 0.02},
    "mistral": {"head_dim": 20, "sliding_window": None},
    "mistral:wide-window": {"sliding_window": 64},
    "qwen2": {},
    "qwen2:tied": {"tie_word_embeddings": True},
    "gemma": {"head_dim": 16},
    "gemma:bias-untied": {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False},
    "phi3": {},
    "phi3:partial": {"hidden_size": 64, "partial_rotary_factor": 0.5},
    "granite": {
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "logits_scaling": 0.7,
        "tie_word_embeddings": True,
    },
    "granite:bias": {"residual_multiplier": 0.3, "attention_bias": True},
    "smollm3": {"num_hidden_layers": 4},
    "smollm3:bias-untied": {
        "no_rope_layers": [0, 1],
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "glm": {"head_dim": 16},
    "glm:nobias-tied": {"head_dim": 12, "attention_bias": False, "tie_word_embeddings": True},
    "helium": {"head_dim": 12, "rms_norm_eps": 1e-8},
    "helium:bias-tied": {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    "ernie4_5": {"head_dim": 16},
}
BIASED = {"qwen2", "qwen2:tied", "glm", *(name for name in SOURCES if "bias" in name)}
BIASED -= {"glm:nobias-tied"}
PLAIN = [name for name in SOURCES if name not in BIASED]
PLAINEST = [name for name in SOURCES if ":" not in name]
FORMS = [(name, "constant") for name in PLAINEST]
FORMS += [(name, "epsilon") for name in PLAINEST if name in PLAIN]


@contextmanager
def real_float64() -> Iterator[None]:
    """Tables of frequencies, too, as the stock classes have them in ``Float64``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A random stock model; its biases have a standard deviation of 2."""
    model = make(family(name), {**_BASE, **SOURCES[name], **settings}, seed=4)
    for key, weight in model.named_parameters():
        if key.endswith("bias"):
            weight.data.mul_(20 / 3)
    model.to(dtype).save_pretrained(folder)
    return folder


def target_of(facts: ModelFacts, **options: Any) -> Target | None:
    """The class for the lossless latent form of every layer."""
    geometry, turning = facts.geometry, [rope.dim for rope in facts.ropes if rope.dim]
    still = geometry.head_dim - min(rope.dim for rope in facts.ropes)
    settings = {
        "rank": geometry.kv_heads * (still + geometry.value_dim),
        "planes": tuple(range(turning[0] // 2)) * geometry.kv_heads if turning else (),
        "nope_dim": still,
        "arch": "deepseek_v3",
        "inert": "constant",
        "dtype": "float64",
        "largest": None,
    }
    return deepseek_class(facts, **{**settings, **options})


def write_latent(source: Path, folder: Path, **options: Any) -> Path:
    """The source as latent layers, written for the class; ``options`` go to it."""
    facts, _ = facts_of(source)
    wide = options.get("dtype", "float64") == "float64"
    with real_float64() if wide else nullcontext():
        target = target_of(facts, **options)
    assert target is not None

    def latent(layer: AttentionLayer) -> LatentLayer:
        return embedded(layer, facts.scales[0])

    return written_as(source, folder, target, latent, options.get("dtype", "float64"))


def written_as(
    source: Path,
    folder: Path,
    target: Target,
    convert: Callable[[AttentionLayer], LatentLayer],
    dtype: str = "float64",
) -> Path:
    """A source whose layers ``convert`` makes latent, as a folder of the target's class."""
    facts, stored = facts_of(source)
    tensors = {name: tensor.double() for name, tensor in stored.items()}
    result = apply(tensors, facts, target, convert, reads=_READS)
    own = getattr(torch, dtype)
    folder.mkdir()
    rounded = {name: tensor.to(own) for name, tensor in result.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**target.edit(read_json(source / "config.json")), "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(source: Path, result: Path, *, tokens: int = 9) -> None:
    """Fail unless two folders give the same logits in float64."""
    expected, actual = load(source), load(result)
    ids = random_ids(expected, tokens)
    assert_close(full_logits(actual, ids), full_logits(expected, ids), atol=1e-10)
