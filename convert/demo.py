"""The demo: the bundled model in every conversion, and a table of what each one costs."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.reader import read_json
from convert.console import Console
from convert.evaluate import evaluate_checkpoint
from convert.facts import read_facts
from convert.pipeline import convert
from convert.recipe import make_recipe
from kvpatch.errors import OutputError
from kvpatch.memory import format_bytes

__all__ = ["run_demo"]

_CONTEXT, _SAMPLES = 256, 32
_TEXT: dict[str, Any] = {"samples": 16, "context": 128}
_CALIBRATED: dict[str, Any] = {"merge": "svd", **_TEXT}
_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("GQA, 4 KV heads, first", {"method": "gqa", "kv_heads": 4, "merge": "first"}),
    ("GQA, 4 KV heads, mean", {"method": "gqa", "kv_heads": 4, "merge": "mean"}),
    ("GQA, 2 KV heads, mean", {"method": "gqa", "kv_heads": 2, "merge": "mean"}),
    ("MQA, 1 KV head, mean", {"method": "mqa", "merge": "mean"}),
    ("GQA, 4 KV heads, svd", {"method": "gqa", "kv_heads": 4, "merge": "svd"}),
    ("GQA, 2 KV heads, svd", {"method": "gqa", "kv_heads": 2, "merge": "svd"}),
    ("MQA, 1 KV head, svd", {"method": "mqa", "merge": "svd"}),
    ("GQA, 4 KV heads, calibrated", {"method": "gqa", "kv_heads": 4, **_CALIBRATED}),
    ("GQA, 2 KV heads, calibrated", {"method": "gqa", "kv_heads": 2, **_CALIBRATED}),
    ("MQA, 1 KV head, calibrated", {"method": "mqa", **_CALIBRATED}),
    ("CLA2, 8 KV heads, mean", {"method": "cla", "share": 2, "merge": "mean"}),
    ("CLA2, 8 KV heads, calibrated", {"method": "cla", "share": 2, **_CALIBRATED}),
    ("MLA, 25 % of the cache", {"method": "mla", "kv_budget": "25%"}),
    ("MLA, 25 %, calibrated", {"method": "mla", "kv_budget": "25%", **_TEXT}),
    ("MLA, 12.5 %, calibrated", {"method": "mla", "kv_budget": "12.5%", **_TEXT}),
    ("MLA, 12.5 %, per layer", {"method": "mla", "kv_budget": "12.5%", "per_layer": True, **_TEXT}),
)


def run_demo(console: Console, keep: Path | None) -> None:
    """Convert, measure, and print the table.

    Args:
        console: Where it goes.
        keep: New folder for the converted models; they are deleted afterwards if not given.

    Raises:
        OutputError: If ``keep`` exists.
    """
    if keep is not None and keep.exists():
        raise OutputError(f"{keep} exists; choose a new folder for --keep")
    assets = resources.files("convert").joinpath("assets")
    with (
        resources.as_file(assets) as folder,
        tempfile.TemporaryDirectory() if keep is None else nullcontext(str(keep)) as work,
    ):
        source, text = folder / "demo-model", folder / "demo-text.txt"
        console.note(f"source: {source}")
        facts = read_facts(read_json(source / "config.json"))
        evaluation = evaluate_checkpoint(source, text, context=_CONTEXT, samples=_SAMPLES)
        name = f"source, {facts.geometry.kv_heads} KV heads"
        rows = [_row(name, facts.cache().bytes_per_token, evaluation.perplexity, 0.0)]
        for title, keys in _VARIANTS:
            output = (
                Path(work)
                / title.replace(", ", "-").replace(" ", "-").replace("%", "percent").lower()
            )
            console.note(f"converting: {title}")
            paths = {"source": str(source), "output": str(output)}
            if "samples" in keys:
                paths["calibration"] = str(folder / "demo-calibration.txt")
            convert(make_recipe({**keys, **paths}))
            cached = read_manifest(output)["kv_cache"]["bytes_per_token"][1]
            evaluation = evaluate_checkpoint(
                output, text, against=source, context=_CONTEXT, samples=_SAMPLES
            )
            assert evaluation.against is not None
            rows.append(
                _row(
                    title,
                    cached,
                    evaluation.perplexity,
                    evaluation.against.kl,
                )
            )
    console.result(rows, lambda: _print(rows, console))
    if keep is not None:
        console.note(f"the converted models are in {keep}")


def _row(variant: str, per_token: int, perplexity: float, kl: float) -> dict[str, Any]:
    return {
        "variant": variant,
        "kv_bytes_per_token": per_token,
        "perplexity": perplexity,
        "kl": kl,
    }


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    console.table(
        "",
        ["variant", "KV cache per token", "perplexity", "KL to the source (nats)"],
        [
            (
                row["variant"],
                format_bytes(row["kv_bytes_per_token"]),
                f"{row['perplexity']:.2f}",
                f"{row['kl']:.3f}",
            )
            for row in rows
        ],
    )
