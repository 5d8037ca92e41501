"""Hand-written manifests of converted checkpoints, as much of them as a report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["HEADS", "LAYERS", "SIMILARITY", "evaluation", "layer", "manifest", "write"]

LAYERS, HEADS = 5, 4
SOURCES = [0, 1, 1, 3, 3]
SIMILARITY = [[0.9 ** abs(i - j) for j in range(LAYERS)] for i in range(LAYERS)]


def evaluation(kl: float | None, text: str = "valid.txt", **more: Any) -> dict[str, Any]:
    against = None if kl is None else {"kl": kl, "perplexity": 5.0, "top1": 0.75}
    return {
        "text": text,
        "text_sha256": f"{text} hash",
        "windows": 8,
        "context": 128,
        "stride": 128,
        "dtype": "float32",
        "tokens": 1016,
        "nll": 2.0,
        "perplexity": 7.5,
        "against": against,
        **more,
    }


def layer(index: int, source: int, *, heads: int = HEADS, measured: bool) -> dict[str, Any]:
    result = {
        "layer": index,
        "source": source,
        "kv_heads": [heads, 2],
        "lost_energy_k": 0.01 * index,
        "lost_energy_v": 0.1 + 0.01 * index,
        "lost_heads_k": [0.01 * index + 0.002 * head for head in range(heads)],
        "lost_heads_v": [0.1 + 0.01 * index + 0.002 * head for head in range(heads)],
    }
    if measured:
        result |= {"attention_kl": 0.3 * index, "output_error": 0.05 * index}
    return result


def manifest(
    size: int = 1000, kl: float | None = 0.5, *, shared: bool = False, **changed: Any
) -> dict[str, Any]:
    sources = SOURCES if shared else list(range(LAYERS))
    return {
        "format_version": 1,
        "source": {"name": "org/small", "files": {"model.safetensors": {"sha256": "5a" * 32}}},
        "recipe": {"method": "cla" if shared else "gqa", "merge": "svd"},
        "kv_cache": {"kv_source_layers": sources, "bytes_per_token": [4000, size]},
        "layers": [layer(i, source, measured=shared) for i, source in enumerate(sources)],
        "evaluations": [] if kl is None else [evaluation(kl)],
        **({"similarity": SIMILARITY} if shared else {}),
        **changed,
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "kvpatch.json").write_text(json.dumps(content))
    return folder
