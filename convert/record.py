"""What kvpatch.json says of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from convert.checkpoint.staging import Staging
from convert.checkpoint.writer import FileRecord
from convert.hub import Source
from convert.texts import Windows

if TYPE_CHECKING:
    from convert.preparing import Prepared

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
    source, plan, export = prepared.source, prepared.plan, prepared.export
    results = [result for shard in plan.shards for result in staging.finished[shard.file][1]]
    context = plan.facts.context
    return {
        "source": {
            "name": source.name,
            "repository": source.repository,
            "architecture": plan.facts.family.architecture,
            "revision": source.revision,
            "metadata": prepared.metadata,
            **({} if source.base is None else {"base": _base(source.base)}),
            "files": {
                name: {"size": record.size, "sha256": record.sha256}
                for name, record in sources.items()
            },
        },
        "recipe": prepared.scheme.result_keys,
        "calibration": _calibration(prepared),
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
        **({"caveats": list(prepared.scheme.caveats)} if prepared.scheme.caveats else {}),
        **({} if export is None else {"lineage": _lineage(export.earlier, sources)}),
    }


def _base(base: Source) -> dict[str, Any]:
    """The model that a source, which is an adapter alone, is merged into."""
    return {"name": base.name, "repository": base.repository, "revision": base.revision}


def _lineage(
    earlier: Mapping[str, Any] | None, sources: Mapping[str, FileRecord]
) -> list[dict[str, Any]]:
    """The conversions before an export, first to last; ``trained`` if weights changed afterwards.

    Args:
        earlier: Manifest of what is exported; None if it has none.
        sources: Size and sha256 of its weight files.
    """
    if earlier is None:
        return []
    recorded = {name: record["sha256"] for name, record in earlier["files"].items()}
    moved = any(recorded.get(name) != record.sha256 for name, record in sources.items())
    kept = ("source", "recipe", "calibration", "layers", "trainings")
    last = {key: earlier[key] for key in kept if key in earlier}
    return [*earlier.get("lineage", []), {**last, "trained": moved or "trainings" in last}]


def _calibration(prepared: Prepared) -> dict[str, Any] | None:
    """The calibration text; of an export, what was made from it still is."""
    if prepared.export is not None:
        earlier = prepared.export.earlier
        text: dict[str, Any] | None = None if earlier is None else earlier["calibration"]
        return text
    return None if prepared.windows is None else _text(prepared.windows)


def _sizes(prepared: Prepared) -> dict[str, Any]:
    """What the cache of a layer holds, before and after."""
    scheme, heads = prepared.scheme, prepared.plan.facts.geometry.kv_heads
    before = None if prepared.export is not None else heads
    sizes = {"kv_heads": [before, scheme.kv_heads]}
    return sizes if scheme.latent is None else {**sizes, "latent": scheme.latent}


def _text(windows: Windows) -> dict[str, Any]:
    count, context = windows.tokens.shape
    return {
        "text": windows.text,
        "text_sha256": windows.text_sha256,
        **({"dataset": windows.dataset} if windows.dataset else {}),
        "tokens_sha256": windows.tokens_sha256,
        "samples": count,
        "context": context,
    }
