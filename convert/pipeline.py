"""The one road: a prepared conversion -> calibrate -> convert -> side files -> publish."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from convert.calibrate import Calibration
from convert.calibrate_latent import LatentConverting, latent_unit
from convert.card import render_card
from convert.checkpoint.index import INDEX, index_json
from convert.checkpoint.manifest import encode_manifest
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.scratch import Scratch
from convert.checkpoint.staging import MANIFEST, Staging, check_output
from convert.checkpoint.writer import FileRecord, copy_file, write_file
from convert.execute import execute
from convert.exporting import export_unit
from convert.facts import has_latents, read_facts
from convert.hub import user_path
from convert.methods import Converted
from convert.plan import Plan
from convert.preparing import Prepared, Progress, prepare
from convert.progress import PARTS
from convert.quantities import parse_size
from convert.recipe import ExportRecipe, Recipe
from convert.record import manifest_of
from convert.resources import check_disk, check_ram
from convert.signals import sigterm_unwinds
from convert.steps import Step
from convert.streams import Converting
from convert.targets.native import config_json, with_dtype
from kvpatch.errors import KvpatchError, UsageError, VerificationError
from kvpatch.models import source_files

__all__ = ["convert", "obstacles"]

_CONFIG, _CARD = "config.json", "README.md"


def convert(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Path:
    """Convert a checkpoint; afterwards the output is complete, or as it was before.

    Args:
        recipe: What to convert, how and where to.
        progress: Called with what is being done, how much of it just was, and how much it is.
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
    with sigterm_unwinds(), prepare(recipe, to_write=True, progress=progress) as prepared:
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
            calibration = _calibrate(prepared, staging, progress)
            total = plan.output_bytes
            sources = execute(
                plan,
                prepared.checkpoint,
                staging,
                converted=_converted(prepared, calibration),
                allow_nonfinite=recipe.allow_nonfinite,
                progress=lambda n: progress("converting", n, total) if progress else None,
            )
            similarity = calibration.similarity() if calibration is not None else None
            _write_small_files(prepared, staging, sources, similarity)
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


def _calibrate(
    prepared: Prepared, staging: Staging, progress: Progress | None
) -> Converting | None:
    """Convert all layers with the calibration text, if there is one."""
    recipe = prepared.recipe
    if prepared.windows is None or isinstance(recipe, ExportRecipe) or recipe.refit is None:
        return None
    common: dict[str, Any] = {
        "plan": prepared.plan,
        "checkpoint": prepared.checkpoint,
        "scratch": Scratch(staging.scratch),
        "tokens": prepared.windows.tokens,
        "refit_scores": recipe.refit in {"q", "qo"},
        "refit_output": recipe.refit in {"o", "qo"},
        "seed": recipe.seed,
        "device": recipe.device,
    }
    calibration: Converting = (
        Calibration(**common)
        if prepared.latents is None
        else LatentConverting(**common, choice=prepared.latents)
    )
    total = PARTS * prepared.plan.facts.layers
    calibration.run(lambda n: progress("calibrating", n, total) if progress else None)
    return calibration


def _converted(
    prepared: Prepared, calibration: Converting | None
) -> Callable[[Step], Converted] | None:
    """What gives the engine its converted layers, if not the method alone."""
    if calibration is not None:
        return lambda step: calibration.unit(step.layers)
    if prepared.export is not None:
        return partial(export_unit, checkpoint=prepared.checkpoint, export=prepared.export)
    if prepared.latents is None:
        return None
    return partial(
        latent_unit,
        plan=prepared.plan,
        checkpoint=prepared.checkpoint,
        choice=prepared.latents,
    )


def _write_small_files(
    prepared: Prepared,
    staging: Staging,
    sources: dict[str, FileRecord],
    similarity: list[list[float]] | None,
) -> None:
    """Side files, config, index, card and manifest, in this order."""
    plan, recipe, folder = prepared.plan, prepared.recipe, staging.path
    files = {file: record for file, (record, _) in staging.finished.items()}
    for name, origin in prepared.side_files.items():
        files[name] = copy_file(guarded_path(origin, name), folder / name)
    target = plan.target
    config = with_dtype(target.edit(prepared.checkpoint.config), recipe.dtype)
    files[_CONFIG] = write_file(folder / _CONFIG, config_json(config))
    if target.name == "kvpatch":
        for path in source_files():
            files[path.name] = copy_file(path, folder / path.name)
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        index = index_json(weight_map, parameters=plan.parameters, size=plan.output_bytes)
        files[INDEX] = write_file(folder / INDEX, index)
    manifest = manifest_of(prepared, staging, sources)
    if similarity is not None:
        manifest["similarity"] = similarity
    card = render_card(manifest)
    files[_CARD] = write_file(folder / _CARD, card)
    write_file(folder / MANIFEST, encode_manifest(manifest, files))


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
        if not has_latents(written.config):  # no row of the family table describes latent attention
            read_facts(written.config)
    if found != planned:
        wrong = sorted(
            name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name)
        )
        raise VerificationError(f"{folder}: written tensors differ from the plan: {wrong[:5]}")
