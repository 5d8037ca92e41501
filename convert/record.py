"""What kvpatch.json says of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from convert.checkpoint.staging import Staging
from convert.checkpoint.writer import FileRecord
from convert.texts import Windows

if TYPE_CHECKING:
    from convert.pipeline import Prepared

__all__ = ["manifest_of"]


def manifest_of(
    prepared: Prepared, staging: Staging, sources: Mapping[str, FileRecord]
) -> dict[str, Any]:
    """Everything but the hashes of the result's own files.

    Args:
        prepared: What was done.
        staging: The finished shards, with the results of their layers.
        sources: Size and sha256 of every source file.
    """
    source, plan, windows = prepared.source, prepared.plan, prepared.windows
    results = [result for shard in plan.shards for result in staging.finished[shard.file][1]]
    context = plan.facts.context
    return {
        "source": {
            "name": source.name,
            "repository": source.repository,
            "architecture": plan.facts.family.architecture,
            "revision": source.revision,
            "metadata": prepared.metadata,
            "files": {
                name: {"size": record.size, "sha256": record.sha256}
                for name, record in sources.items()
            },
        },
        "recipe": prepared.scheme.result_keys,
        "calibration": None if windows is None else _text(windows),
        "architecture": plan.target.architecture,
        "converted": sorted(plan.method.reads | plan.target.reads),
        "kv_cache": {
            **_sizes(prepared),
            "kv_source_layers": list(plan.sources),
            "context": context,
            "bytes_per_token": [plan.before.bytes_per_token, plan.after.bytes_per_token],
            "bytes_at_context": [plan.before.size(context), plan.after.size(context)],
        },
        "layers": sorted(results, key=lambda result: result["layer"]),
        "evaluations": [],
    }


def _sizes(prepared: Prepared) -> dict[str, Any]:
    """What the cache of a layer holds, before and after."""
    heads, scheme = prepared.plan.facts.geometry.kv_heads, prepared.scheme
    sizes = {"kv_heads": [heads, scheme.kv_heads]}
    return sizes if scheme.latent is None else {**sizes, "latent": scheme.latent}


def _text(windows: Windows) -> dict[str, Any]:
    count, context = windows.tokens.shape
    return {
        "text": windows.text,
        "text_sha256": windows.text_sha256,
        "tokens_sha256": windows.tokens_sha256,
        "samples": count,
        "context": context,
    }
