"""Sound tiny checkpoints that cases start from, made once and copied by hard link."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.families.stock import make
from tests.families.texts import random_text, write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import cli

__all__ = ["BASES", "WAYS", "Bases", "link_folder", "make_bases"]

# Among them every packing (separate, fused, by head, by four blocks, transposed), all positions
# (RoPE in halves, interleaved, partial, by layer; learned; ALiBi), windows, norms of queries and
# keys for all heads and for each, biases, experts, tied and untied heads, and shards.
BASES = (
    "llama",
    "gpt2",
    "gemma3_text",
    "phi3:window-partial",
    "qwen2_moe:window",
    "bloom",
    "codegen",
    "cohere:norm-bias-untied",
)
_SHARDED = {"llama": "40KB", "bloom": "30KB"}

# recipes without their paths; a text is there for those that name one
_WINDOWS = {"samples": 3, "context": 16, "calibration": "text.txt"}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "gqa mean": {"method": "gqa", "kv_heads": 2},
    "gqa svd": {"method": "gqa", "kv_heads": 2, "merge": "svd", **_WINDOWS},
    "cla": {"method": "cla", "share": 2},
    "mla budget": {"method": "mla", "kv_budget": "50%"},
    "mla sizes": {"method": "mla", "rank": 12, "rope_dims": 4},
}


@dataclass(frozen=True, slots=True)
class Bases:
    """Where everything lies that cases are made of.

    Args:
        sources: Checkpoint folders by name.
        text: A text in characters that the tokenizers know.
        earlier: A result of kvpatch, to be replaced.
    """

    sources: Mapping[str, Path]
    text: Path
    earlier: Path


def make_bases(root: Path) -> Bases:
    """Write all that cases start from."""
    sources = {}
    for name in BASES:
        folder = root / name.replace(":", "-")
        shards = {"max_shard_size": _SHARDED[name]} if name in _SHARDED else {}
        make(name, settings(name)).save_pretrained(folder, **shards)
        write_tokenizer(folder)
        sources[name] = folder
    text = root / "text.txt"
    text.write_text(random_text(400, seed=0))
    earlier = root / "earlier"
    run = cli(["gqa", str(sources["llama"]), str(earlier), "--kv-heads", "1"])
    assert run.code == 0, run.err
    return Bases(sources, text, earlier)


def link_folder(source: Path, target: Path) -> None:
    """A copy of a folder that shares its files; to change one, replace it."""
    for folder, _, files in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True)
        for name in files:
            os.link(Path(folder) / name, here / name)
