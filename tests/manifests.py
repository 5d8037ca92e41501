"""Hand-written manifests of converted checkpoints, as much of them as a report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "HEADS",
    "LAYERS",
    "SIMILARITY",
    "SOURCE",
    "evaluation",
    "latent_manifest",
    "layer",
    "manifest",
    "probe",
    "task",
    "training",
    "write",
]

LAYERS, HEADS = 5, 4
SOURCES = [0, 1, 1, 3, 3]
SOURCE = {
    "name": "org/small",
    "repository": "org/small",
    "revision": "c0ffee",
    "architecture": "LlamaForCausalLM",
    "files": {"model.safetensors": {"sha256": "5a" * 32}},
}
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
        "versions": {"kvpatch": "0.1.0", "torch": "2.13.0"},
        "source": SOURCE,
        "recipe": {"method": "gqa", "merge": "svd", "refit": "none", "kv_heads": 2}
        | ({"method": "cla", "share": 2} if shared else {}),
        "architecture": "LlamaForCausalLM",
        "calibration": {"text": "train.txt", "text_sha256": "7c", "samples": 4, "context": 32}
        if shared
        else None,
        "kv_cache": {
            "kv_heads": [HEADS, 2],
            "kv_source_layers": sources,
            "bytes_per_token": [4000, size],
        },
        "layers": [layer(i, source, measured=shared) for i, source in enumerate(sources)],
        "evaluations": [] if kl is None else [evaluation(kl)],
        **({"similarity": SIMILARITY} if shared else {}),
        **changed,
    }


def latent_manifest(size: int = 500, kl: float | None = 0.2, **changed: Any) -> dict[str, Any]:
    """One of latents."""
    layers = [
        {
            "layer": index,
            "source": index,
            "rank": 12,
            "rope_dims": 4,
            "lost_energy_rope": 0.01 * index,
            "lost_energy_latent": 0.02 * index,
        }
        for index in range(LAYERS)
    ]
    return manifest(size, kl) | {
        "recipe": {"method": "mla", "refit": "qo", "kv_budget": 0.25},
        "kv_cache": {
            "kv_heads": [HEADS, HEADS],
            "latent": {"rank": 12, "rope_dims": 4},
            "bytes_per_token": [4000, size],
        },
        "layers": layers,
        **changed,
    }


def training(tokens: int, kl: list[float], **changed: Any) -> dict[str, Any]:
    """An uptraining run, measured at equal steps from before it to its end."""
    last = len(kl) - 1
    return {
        "tokens": tokens,
        "steps": tokens // 100,
        "curve": [
            {"tokens": index * tokens // last, "rate": 1e-4, "eval_kl": loss, "eval_nll": 2 + loss}
            | ({"kl": 2 * loss, "ce": 0.0} if index else {})
            for index, loss in enumerate(kl)
        ],
        "teacher": "org/small",
        "data": {"name": "train.txt", "sha256": "7c"},
        "eval_text": {"name": "held.txt", "sha256": "8d"},
        "recipe": {"context": 64, "eval_samples": 8, "groups": "all", "lora": None},
        "versions": {"kvpatch": "0.1.0", "torch": "2.13.0"},
        **changed,
    }


def _mean(value: float, source: float | None) -> dict[str, Any]:
    difference = None if source is None else value - source
    return {
        "value": value,
        "error": 0.01,
        "source": source,
        "difference": difference,
        "difference_error": None if source is None else 0.02,
    }


def probe(**changed: Any) -> dict[str, Any]:
    """A probe of retrieval at two lengths and one depth."""
    cells = [
        {
            "length": length,
            "depth": 50.0,
            "exact": _mean(0.75, 1.0),
            "log_likelihood": _mean(-3.0, -1.0),
            "gain": _mean(4.0, 6.0),
        }
        for length in (128, 256)
    ]
    return {
        "text": "built-in text",
        "text_sha256": "9e",
        "key": "digits",
        "lengths": [128, 256],
        "depths": [50.0],
        "trials": 4,
        "seed": 0,
        "dtype": "float32",
        "cells": cells,
        "exact": _mean(0.75, 1.0),
        "gain": _mean(4.0, 6.0),
        **changed,
    }


def task(name: str = "arc_easy") -> dict[str, Any]:
    """Scores of a task."""
    return {
        "task": name,
        "version": "1.0",
        "harness": "0.4.13",
        "dataset": "org/questions",
        "subset": None,
        "fewshot": 0,
        "limit": None,
        "samples": 200,
        "dtype": "float32",
        "metrics": [
            {
                "name": "acc",
                "filter": "none",
                "higher_is_better": True,
                "mean": _mean(0.5125, 0.545),
            }
        ],
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "kvpatch.json").write_text(json.dumps(content))
    return folder
