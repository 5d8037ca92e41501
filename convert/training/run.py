"""The one road of an uptraining run: source -> models -> training -> folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from convert.adapters import made_with
from convert.checkpoint.adapter_config import ADAPTER_CONFIG
from convert.checkpoint.manifest import read_manifest, tool_versions
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import Checkpoint, read_json
from convert.checkpoint.staging import Staging, check_output
from convert.hub import Source, fetch_source, user_path
from convert.lengths import check_length, position_limit
from convert.loading import (
    check_device,
    check_same_tokens,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from convert.opening import open_model
from convert.resources import check_disk, check_ram
from convert.results import without_results
from convert.signals import sigterm_unwinds
from convert.training.data import check_text
from convert.training.groups import adapted_modules
from convert.training.loop import Note, Outcome, Progress, Training, make_accelerator
from convert.training.native import Detour, detour_of
from convert.training.publish import check_files, stored_names, write_result
from convert.training.recipe import UptrainRecipe
from convert.training.student import check_head
from kvpatch.errors import UsageError

__all__ = ["Prepared", "prepare", "uptrain"]

# bytes of a parameter in training: weight, gradient and two moments in float32
_STATE_BYTES = 16
# and of one in the folders of a detour: before and after training, and exported back
_DETOUR_BYTES = 12
_OVERHEAD = 1_000_000_000
# keys that do not change what comes out, and names of what is known by its hash
_NOT_IDENTITY = {
    "source",
    "output",
    "teacher",
    "data",
    "eval_text",
    "overwrite",
    "resume",
    "device",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that was planned but not begun.

    Args:
        recipe: With every choice made that does not depend on the machine.
        source: The model that is trained.
        teacher: What it learns from, if anything.
        checkpoint: The open source.
        manifest: Its kvpatch.json.
        detour: What is done before and after, if its own class is not trained.
        parameters: Of the model.
        run_id: Hash of everything that the result depends on.
        warnings: What should be read before.
    """

    recipe: UptrainRecipe
    source: Source
    teacher: Source | None
    checkpoint: Checkpoint
    manifest: dict[str, Any]
    detour: Detour | None
    parameters: int
    run_id: str
    warnings: list[str]

    @property
    def steps(self) -> int:
        """Of the optimiser, on one device."""
        recipe = self.recipe
        return -(
            -recipe.tokens // (recipe.batch * recipe.grad_accumulation * (recipe.context or 1))
        )

    @property
    def peak_ram(self) -> int:
        """Bytes of weights, gradients and optimiser, of the teacher, and of what runs them."""
        teacher = 4 * self.parameters if self.teacher is not None else 0
        return _STATE_BYTES * self.parameters + teacher + _OVERHEAD

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: weights and two moments."""
        return 12 * self.parameters

    @property
    def disk_bytes(self) -> int:
        """Of all that is on the disk at once, at most: two checkpoints, and what a detour needs."""
        detour = _DETOUR_BYTES * self.parameters if self.detour is not None else 0
        return 2 * self.checkpoint_bytes + detour


@contextmanager
def prepare(recipe: UptrainRecipe, *, to_write: bool = False) -> Iterator[Prepared]:
    """Open what a recipe names and plan its run, from headers alone.

    Args:
        recipe: What to train, on what and where to.
        to_write: The run follows: check its output first.

    Raises:
        KvpatchError: For everything that is wrong with recipe, source or teacher.
    """
    source = fetch_source(recipe.source)
    if to_write and recipe.output is not None:
        check_output(user_path(recipe.output), source.path, overwrite=recipe.overwrite)
    check_device("cuda" if recipe.device == "cuda" else "cpu")
    manifest = read_manifest(source.path)
    if (source.path / ADAPTER_CONFIG).exists():
        raise UsageError(
            f"an adapter lies beside the weights of {source.name} ({ADAPTER_CONFIG}), which "
            "training would leave as it is",
            hint="Merge it into the weights, or move it elsewhere.",
        )
    with open_model(source, latents=True) as model:
        checkpoint = model.checkpoint
        check_files(checkpoint, manifest)
        detour = detour_of(checkpoint)
        context = recipe.context or min(512, position_limit(checkpoint.config))
        asked = f"--context {context}"
        warnings = check_length(checkpoint.config, context, name=recipe.source, asked=asked)
        paths = {
            key: value if value is None or value.startswith("hub:") else str(user_path(value))
            for key, value in (("data", recipe.data), ("eval_text", recipe.eval_text))
        }
        recipe = recipe.model_copy(update={"context": context, **paths})
        texts = (recipe.data, recipe.eval_text)
        for text in filter(None, texts):
            check_text(text)
        teacher = _teacher(recipe, manifest)
        if teacher is not None:
            config = read_json(guarded_path((teacher.base or teacher).path, "config.json"))
            theirs = check_length(config, context, name=teacher.name, asked=asked)
            warnings = warnings or theirs
        identity = {
            "recipe": recipe.model_dump(exclude=_NOT_IDENTITY),
            "source": manifest["files"],
            "teacher": None if teacher is None else _weight_sizes(teacher.folders),
            "texts": [_text_hash(text) for text in texts],
        }
        yield Prepared(
            recipe=recipe,
            source=source,
            teacher=teacher,
            checkpoint=checkpoint,
            manifest=manifest,
            detour=detour,
            parameters=sum(
                info.nbytes // info.dtype.itemsize for info in checkpoint.tensors.values()
            ),
            run_id=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            warnings=warnings,
        )


def uptrain(
    recipe: UptrainRecipe,
    *,
    progress: Progress | None = None,
    note: Note | None = None,
    warn: Note | None = None,
) -> Path | None:
    """Train a converted model; afterwards the output is complete, or as it was before.

    Args:
        recipe: What to train, on what and where to.
        progress: Called with what is being done, how much of it just was, and how much it is.
        note: Called with messages.
        warn: Called with each warning.

    Returns:
        The output folder; None in all processes but the first.

    Raises:
        KvpatchError: For everything that a user can cause or mend.
        KeyboardInterrupt: On SIGINT, and ``Terminated`` on SIGTERM; checkpoints are kept.
    """
    if recipe.output is None:
        raise UsageError("no output folder is given")
    out = user_path(recipe.output)
    with (
        sigterm_unwinds(),
        make_accelerator(recipe) as accelerator,
        prepare(recipe, to_write=accelerator.is_main_process) as prepared,
    ):
        staging = Staging(out, prepared.run_id, resume=recipe.resume, overwrite=recipe.overwrite)
        if not accelerator.is_main_process:
            accelerator.wait_for_everyone()  # the first process has the lock, and cleaned up
            _train(prepared, accelerator, staging.scratch, None, None)
            return None
        for warning in prepared.warnings:
            if warn is not None:
                warn(warning)
        if accelerator.device.type == "cpu":
            check_ram(prepared.peak_ram, None, what="uptraining")
        check_disk(prepared.disk_bytes, out.absolute().parent)
        detour, scratch = prepared.detour, staging.scratch
        with staging:
            scratch.mkdir(exist_ok=True)
            if detour is not None:
                detour.begin(prepared.source.path, scratch, progress)
            accelerator.wait_for_everyone()
            outcome, weights = _train(prepared, accelerator, scratch, progress, note)
            manifest = _manifest(prepared, outcome, accelerator)
            if detour is not None:
                manifest["trainings"][-1]["form"] = detour.record(scratch)
                weights = detour.end(
                    prepared.checkpoint, scratch, weights, prepared.run_id, progress
                )
            total = sum(info.nbytes for info in prepared.checkpoint.tensors.values())
            write_result(
                staging,
                prepared.checkpoint,
                manifest,
                weights,
                lambda n: progress("writing", n, total) if progress else None,
            )
            staging.publish()
    return out


def _train(
    prepared: Prepared,
    accelerator: Any,
    folder: Path,
    progress: Progress | None,
    note: Note | None,
) -> tuple[Outcome, Mapping[str, torch.Tensor]]:
    """Train, and give the weights by the names that they have on the disk.

    Args:
        prepared: The run.
        accelerator: From ``make_accelerator``.
        folder: For all that an interrupted run wants to find again.
        progress: As of ``uptrain``.
        note: As of ``uptrain``.
    """
    recipe = prepared.recipe
    sharded = str(accelerator.distributed_type) not in {
        f"DistributedType.{kind}" for kind in ("NO", "MULTI_CPU", "MULTI_GPU")
    }
    if recipe.lora is not None and sharded:
        raise UsageError(
            f"--lora with {accelerator.distributed_type} is not supported: adapters are merged "
            "into whole weights",
            hint="Train adapters on one device or with DDP, or train all weights.",
        )
    student, teacher, tokenizer = _loaded(prepared, accelerator, folder)
    adapted = _adapted(student, recipe)
    training = Training(
        recipe,
        accelerator,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        folder=folder,
        progress=progress,
        note=note,
    )
    outcome = training.run()
    if adapted is not None:
        student = adapted.merge_and_unload()
        return outcome, stored_names(student, student.state_dict())
    state = accelerator.get_state_dict(training.model)
    inside = {name.removeprefix("student."): weight for name, weight in state.items()}
    return outcome, stored_names(student, inside)


def _loaded(prepared: Prepared, accelerator: Any, folder: Path) -> tuple[Any, Any | None, Any]:
    """Student, teacher and the tokenizer of both."""
    source, detour = prepared.source.path, prepared.detour
    with quiet_transformers():
        tokenizer = load_tokenizer(source)
        start = source if detour is None else detour.form(folder)
        student = load_model(start, dtype=torch.float32)
        check_head(student)
        teacher = None
        if prepared.teacher is not None:
            path = prepared.teacher.path
            check_same_tokens(tokenizer, load_tokenizer(path), source, path)
            narrow = accelerator.mixed_precision == "bf16"
            teacher = load_model(
                path,
                dtype=torch.bfloat16 if narrow else torch.float32,
                adapter=made_with(prepared.manifest),
            )
            check_head(teacher)
    if detour is not None:
        for name, weight in student.named_parameters():
            weight.requires_grad_(not name.endswith(detour.frozen))
    return student, teacher, tokenizer


def _adapted(student: Any, recipe: UptrainRecipe) -> Any | None:
    """The student with adapters put into it, if the recipe wants them."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    conv = any(type(module).__name__ == "Conv1D" for module in student.modules())
    return get_peft_model(
        student,
        LoraConfig(
            r=recipe.lora,
            lora_alpha=2 * recipe.lora,
            target_modules=adapted_modules(student, recipe.groups),
            fan_in_fan_out=conv,
        ),
    )


def _teacher(recipe: UptrainRecipe, manifest: Mapping[str, Any]) -> Source | None:
    if not recipe.needs_teacher:
        return None
    if recipe.teacher is not None:
        return fetch_source(recipe.teacher)
    source = manifest["source"]
    if source["repository"] is None:
        raise UsageError(
            f"{recipe.source} was made from the local folder {source['name']}, which its "
            "kvpatch.json does not locate",
            hint="Give --teacher FOLDER, or --kl 0 --ce 1 to learn from the text alone.",
        )
    return fetch_source(source["repository"], revision=source["revision"])


def _weight_sizes(folders: Sequence[Path]) -> dict[str, int]:
    files = (path for folder in folders for path in sorted(folder.glob("*.safetensors")))
    return {path.name: path.stat().st_size for path in files}


def _text_hash(text: str | None) -> str | None:
    if text is None or text.startswith("hub:"):
        return text
    try:
        with Path(text).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read the text {text}: {error.strerror}") from error


def _manifest(prepared: Prepared, outcome: Outcome, accelerator: Any) -> dict[str, Any]:
    """The source's kvpatch.json with one more training, and measurements that no longer hold."""
    recipe, before = prepared.recipe, prepared.manifest
    kept = recipe.model_dump(exclude=_NOT_IDENTITY)
    training = {
        "start": {"files": {name: before["files"][name] for name in prepared.checkpoint.files}},
        "teacher": None if prepared.teacher is None else prepared.teacher.name,
        "data": _text_record(recipe.data),
        "eval_text": None if recipe.eval_text is None else _text_record(recipe.eval_text),
        "recipe": kept,
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "versions": tool_versions(),
        "evaluations_before": before["evaluations"],
        **asdict(outcome),
    }
    return {**without_results(before), "trainings": [*before.get("trainings", []), training]}


def _text_record(text: str) -> dict[str, Any]:
    if text.startswith("hub:"):
        return {"name": text.removeprefix("hub:"), "sha256": None}
    return {"name": Path(text).name, "sha256": _text_hash(text)}
