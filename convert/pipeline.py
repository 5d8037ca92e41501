"""The one road: source -> facts -> plan -> convert layer by layer -> side files -> publish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from convert.card import inherited_metadata, render_card
from convert.checkpoint.manifest import encode_manifest
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.sidecars import side_files
from convert.checkpoint.staging import MANIFEST, Staging, check_output
from convert.checkpoint.writer import FileRecord, copy_file, write_file
from convert.execute import execute
from convert.facts import ModelFacts, read_facts, with_stored_dtype
from convert.hub import Source, fetch_source, user_path
from convert.methods import Method
from convert.methods.pool import pooling
from convert.methods.svd import svd_merge
from convert.plan import Plan, make_plan
from convert.recipe import Recipe, parse_size
from convert.resources import check_disk, check_ram
from convert.targets.native import edit_config, index_json
from kvpatch.errors import KvpatchError, Terminated, UsageError, VerificationError

__all__ = ["Prepared", "convert", "obstacles", "prepare"]

# keys that say where and how to run, not what the result is
_RUN_KEYS = frozenset({"source", "output", "revision", "max_ram", "overwrite", "resume"})
_INDEX = "model.safetensors.index.json"
_CONFIG, _CARD = "config.json", "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A conversion that was planned but not begun."""

    recipe: Recipe
    source: Source
    checkpoint: Checkpoint
    plan: Plan
    side_files: list[str]
    metadata: dict[str, Any]
    warnings: list[str]


@contextmanager
def prepare(recipe: Recipe) -> Iterator[Prepared]:
    """Open the source of a recipe and plan its conversion; reads headers only.

    Raises:
        KvpatchError: For everything that is wrong with recipe or source.
    """
    source = fetch_source(recipe.source, revision=recipe.revision, allow_pickle=recipe.allow_pickle)
    with Checkpoint(source.path, allow_pickle=recipe.allow_pickle) as checkpoint:
        dtypes = (info.dtype for info in checkpoint.tensors.values())
        facts = with_stored_dtype(read_facts(checkpoint.config), dtypes)
        _check_target(recipe, facts)
        warnings = list(checkpoint.warnings)
        if recipe.kv_heads == 1:
            warnings.append(
                "MQA by pooling loses the most; expect to uptrain (arXiv:2305.13245, appendix A)"
            )
        if recipe.merge == "svd" and facts.qk_norm is not None:
            warnings.append("queries and keys have a norm: keys are averaged, only values merged")
        if "auto_map" in checkpoint.config:
            warnings.append("auto_map is left out of config.json: the result needs no remote code")
        metadata: dict[str, Any] = {}
        try:
            metadata = inherited_metadata(source.path)
        except ValueError as error:
            warnings.append(f"no licence or language is taken over: {error}")
        plan = make_plan(
            checkpoint,
            facts,
            _method(recipe),
            kv_heads=recipe.kv_heads,
            dtype=recipe.dtype,
            max_shard_bytes=parse_size(recipe.max_shard_size),
            recipe=_result_keys(recipe),
        )
        yield Prepared(
            recipe=recipe,
            source=source,
            checkpoint=checkpoint,
            plan=plan,
            side_files=side_files(source.path),
            metadata=metadata,
            warnings=warnings,
        )


def convert(
    recipe: Recipe,
    *,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Convert a checkpoint; afterwards the output is complete, or as it was before.

    Args:
        recipe: What to convert, how and where to.
        progress: Called with bytes just written and bytes in all.
        warn: Called with each warning.

    Returns:
        The output folder.

    Raises:
        KvpatchError: For everything that a user can cause or mend.
        KeyboardInterrupt: On SIGINT, and ``Terminated`` on SIGTERM; finished shards are kept.
    """
    if recipe.output is None:
        raise UsageError("no output folder is given")
    out = user_path(recipe.output)
    with prepare(recipe) as prepared, _sigterm_unwinds():
        check_output(out, prepared.source.path, overwrite=recipe.overwrite)
        plan = prepared.plan
        check_ram(plan.peak_ram, parse_size(recipe.max_ram) if recipe.max_ram else None)
        with Staging(
            out, plan.plan_id, resume=recipe.resume, overwrite=recipe.overwrite
        ) as staging:
            for warning in prepared.warnings + [
                f"{path} is unfinished work of another conversion; delete it if it is not wanted"
                for path in staging.leftovers
            ]:
                if warn is not None:
                    warn(warning)
            done = sum(record.size for record, _ in staging.finished.values())
            check_disk(plan.output_bytes - done, out.absolute().parent)
            total = plan.output_bytes
            sources = execute(
                plan,
                prepared.checkpoint,
                staging,
                allow_nonfinite=recipe.allow_nonfinite,
                progress=lambda count: progress(count, total) if progress else None,
            )
            _write_small_files(prepared, staging, sources)
            _check_staged(plan, staging.path)
            staging.publish()
    return out


def obstacles(prepared: Prepared) -> list[str]:
    """What would stop the run that was planned: its output path, or too little memory."""
    recipe, found = prepared.recipe, []
    limit = parse_size(recipe.max_ram) if recipe.max_ram else None
    checks: list[Callable[[], None]] = [lambda: check_ram(prepared.plan.peak_ram, limit)]
    if recipe.output is not None:
        out = user_path(recipe.output)
        checks.append(lambda: check_output(out, prepared.source.path, overwrite=recipe.overwrite))
    for check in checks:
        try:
            check()
        except KvpatchError as error:
            found.append(f"the run would stop: {error.message}")
    return found


def _check_target(recipe: Recipe, facts: ModelFacts) -> None:
    now, wanted = facts.geometry.kv_heads, recipe.kv_heads
    if recipe.merge == "svd" and facts.clip is not None:
        raise UsageError(
            f"--merge svd would change what clip_qkv {facts.clip} cuts off in this model",
            hint="Choose --merge mean or first.",
        )
    if recipe.group == "similar" and facts.qk_norm is not None:
        raise UsageError(
            "--group similar does not work here: this model's queries and keys have a norm, and "
            "its keys can only be averaged with their neighbours",
            hint="Choose --group adjacent.",
        )
    legal = facts.legal_kv_heads()
    if wanted in legal:
        return
    name = facts.family.model_type
    if not legal:
        raise UsageError(f"this {name} model has a single KV head (MQA) already")
    raise UsageError(
        f"--kv-heads {wanted} does not work for a {name} model with {now} KV heads per layer",
        hint=f"Choose one of {', '.join(map(str, legal))}: smaller than {now} and dividing it.",
    )


def _method(recipe: Recipe) -> Method:
    if recipe.merge == "svd":
        return svd_merge(kv_heads=recipe.kv_heads, grouping=recipe.group)
    return pooling(kv_heads=recipe.kv_heads, merge=recipe.merge)


def _result_keys(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that determines the result; equal results have equal manifests."""
    return {
        key: value
        for key, value in recipe.model_dump().items()
        if key not in _RUN_KEYS and value is not None
    }


def _write_small_files(
    prepared: Prepared, staging: Staging, sources: dict[str, FileRecord]
) -> None:
    """Side files, config, index, card and manifest, in this order."""
    plan, recipe, folder = prepared.plan, prepared.recipe, staging.path
    files = {file: record for file, (record, _) in staging.finished.items()}
    for name in prepared.side_files:
        files[name] = copy_file(guarded_path(prepared.source.path, name), folder / name)
    config = edit_config(prepared.checkpoint.config, kv_heads=recipe.kv_heads, dtype=recipe.dtype)
    files[_CONFIG] = write_file(folder / _CONFIG, config)
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        index = index_json(weight_map, parameters=plan.parameters, size=plan.output_bytes)
        files[_INDEX] = write_file(folder / _INDEX, index)
    manifest = _manifest(prepared, staging, sources)
    card = render_card(manifest)
    files[_CARD] = write_file(folder / _CARD, card)
    write_file(folder / MANIFEST, encode_manifest(manifest, files))


def _manifest(
    prepared: Prepared, staging: Staging, sources: dict[str, FileRecord]
) -> dict[str, Any]:
    source, plan = prepared.source, prepared.plan
    results = [result for shard in plan.shards for result in staging.finished[shard.file][1]]
    context = plan.facts.context
    return {
        "source": {
            "name": source.name,
            "repository": source.repository,
            "revision": source.revision,
            "metadata": prepared.metadata,
            "files": {
                name: {"size": record.size, "sha256": record.sha256}
                for name, record in sources.items()
            },
        },
        "recipe": _result_keys(prepared.recipe),
        "architecture": plan.facts.family.architecture,
        "converted": sorted(plan.method.reads),
        "kv_cache": {
            "kv_heads": [plan.facts.geometry.kv_heads, prepared.recipe.kv_heads],
            "context": context,
            "bytes_per_token": [plan.before.bytes_per_token, plan.after.bytes_per_token],
            "bytes_at_context": [plan.before.size(context), plan.after.size(context)],
        },
        "layers": sorted(results, key=lambda result: result["layer"]),
        "evaluations": [],
    }


def _check_staged(plan: Plan, folder: Path) -> None:
    """Reopen what was written with the strict reader and hold it against the plan.

    Raises:
        VerificationError: If a tensor is not where and what the plan says.
    """
    planned = {
        spec.name: (spec.dtype, spec.shape, shard.file)
        for shard in plan.shards
        for spec in shard.tensors
    }
    with Checkpoint(folder) as written:
        found = {
            info.name: (info.dtype, info.shape, info.file) for info in written.tensors.values()
        }
        read_facts(written.config)
    if found != planned:
        wrong = sorted(
            name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name)
        )
        raise VerificationError(f"{folder}: written tensors differ from the plan: {wrong[:5]}")


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that locks are released and the journal stays whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
