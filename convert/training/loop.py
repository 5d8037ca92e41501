"""The loop: steps of AdamW on exact means over the tokens of all passes and processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convert.tokens import TextTokens, embedding_rows
from convert.training import checkpoints
from convert.training.curve import RECOVERED, Point, tokens_to_recover
from convert.training.data import IGNORED, Batch, Encoder, Sequences, pieces_of, stack
from convert.training.fusing import Decision, computed_by, fuse, on_gpu
from convert.training.groups import Group, parameter_groups, rate_factor
from convert.training.recipe import UptrainRecipe
from convert.training.schedule import rate
from convert.training.student import Distillation, Losses, Weights, packs
from kvpatch.errors import VerificationError

__all__ = ["Outcome", "Training", "make_accelerator"]

Progress = Callable[[str, int, int], None]
Note = Callable[[str], None]
_POINTS = 20  # on the curve, and checkpoints, unless the recipe says how many
_EARLY = 6  # points on the curve from which to estimate how long recovery takes
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a run.

    Args:
        tokens: Trained on.
        steps: Of the optimiser.
        curve: Points from before training to its end.
        reached: Whether it stopped at the KL that was aimed at.
        packed: Whether sequences held several documents.
        rates: Highest learning rate by group of parameters.
        trained: Number of parameters that were trained.
        attention: What computed the attention of each model whose attention was fused.
    """

    tokens: int
    steps: int
    curve: list[Point]
    reached: bool
    packed: bool
    rates: dict[str, float]
    trained: int
    attention: dict[str, list[str]]


@contextmanager
def make_accelerator(recipe: UptrainRecipe) -> Iterator[Any]:
    """What places and wraps models, as the user's accelerate config says."""
    from accelerate import Accelerator  # noqa: PLC0415
    from accelerate.state import AcceleratorState  # noqa: PLC0415

    # accelerate warns of tied weights at each checkpoint, which it restores all the same
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    precision = recipe.precision or ("fp32" if on_cpu else "bf16")
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
        gradient_accumulation_steps=recipe.grad_accumulation,
    )
    _keep_sums_exact(accelerator)
    try:
        yield accelerator
    finally:  # else the next run of this process could not have another precision
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def _keep_sums_exact(accelerator: Any) -> None:
    """Sum gradients in float32 where they are sharded, and leave the losses in it.

    accelerate would have both in the dtype of the arithmetic, which holds three digits.
    """
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


@dataclass(slots=True)
class _State:
    """Everything that a checkpoint keeps, beyond weights, optimiser and random numbers."""

    step: int = 0
    finished: bool = False
    reached: bool = False
    curve: list[Point] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # tokens, KL, CE
    data: dict[str, Any] = field(default_factory=dict)


class Training:
    """One run; the student is trained in place.

    Args:
        recipe: What to do; its paths are those of files that can be read.
        accelerator: From ``make_accelerator``.
        student: Causal LM in float32, perhaps with adapters.
        teacher: Causal LM with the same vocabulary, or None.
        tokenizer: Of both.
        folder: For checkpoints; one there is continued. None keeps none.
        progress: Called with what is done, how much of it just was, and how much it is.
        note: Called with messages.
        fused: Whether kernels compute attention.
    """

    def __init__(
        self,
        recipe: UptrainRecipe,
        accelerator: Any,
        *,
        student: Any,
        teacher: Any | None,
        tokenizer: Any,
        folder: Path | None = None,
        progress: Progress | None = None,
        note: Note | None = None,
        fused: Decision = on_gpu,
    ) -> None:
        self._recipe, self._accelerator, self._folder = recipe, accelerator, folder
        self._progress, self._note = progress, note
        self._shared_rate = rate_factor(student.config)
        context = recipe.context
        assert context is not None
        self._size: int = recipe.batch * recipe.grad_accumulation * accelerator.num_processes
        self._per_step: int = self._size * context
        self.steps: int = math.ceil(recipe.tokens / self._per_step)
        models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
        self._packed = all(map(packs, models.values()))
        rows = embedding_rows(student, teacher)

        def sequences(text: str, seed: int | None) -> Sequences:
            encode = Encoder(TextTokens(tokenizer, rows, text))
            form: dict[str, Any] = {"context": context, "packed": self._packed}
            return Sequences(pieces_of(text), encode, seed=seed, what=text, **form)

        self._text = sequences(recipe.data, recipe.seed)
        self._held: list[Batch] = []
        if recipe.eval_text is not None:
            held = sequences(recipe.eval_text, None)
            self._held = held.whole(recipe.eval_samples)
            for warning in held.warnings:
                self._say(warning)
        self._groups = parameter_groups(student, recipe.groups)
        student.train()
        if recipe.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        if teacher is not None:
            teacher.requires_grad_(False).to(accelerator.device).eval()
        optimizer = torch.optim.AdamW(
            [{"params": list(group.parameters.values())} for group in self._groups],
            lr=recipe.lr,
            betas=_BETAS,
            weight_decay=0.0,
        )
        fusing = models if fused(accelerator.device) else {}
        for model in fusing.values():
            fuse(model)
        module = Distillation(student, teacher, packed=self._packed)
        self.model, self._optimizer = accelerator.prepare(module, optimizer)
        with accelerator.autocast():
            self._attention = {name: computed_by(model) for name, model in fusing.items()}
        self._state = _State()

    def run(self) -> Outcome:
        """Train to the end, from the last checkpoint if there is one.

        Raises:
            VerificationError: If the loss is not finite.
        """
        torch.manual_seed(self._recipe.seed)
        self._resume()
        for name, lines in self._attention.items():
            self._say(f"attention of the {name}: " + "; ".join(lines))
        state, per_step = self._state, self._per_step
        measured = self._interval(self._recipe.eval_every)
        kept = self._interval(self._recipe.checkpoint_every)
        if self._progress is not None and state.step:
            self._progress("training", state.step * per_step, self.steps * per_step)
        if not state.curve:
            self._measure(0)
        while not state.finished:
            self._step(state.step)
            state.step += 1
            if state.step % measured == 0 or state.step == self.steps:
                self._measure(state.step * per_step)
                state.reached = self._at_target()
            state.finished = state.reached or state.step == self.steps
            if state.finished or state.step % kept == 0:
                self._keep()
            if self._progress is not None:
                self._progress("training", per_step, self.steps * per_step)
        for warning in self._text.warnings:
            self._say(warning)
        return Outcome(
            tokens=state.step * per_step,
            steps=state.step,
            curve=state.curve,
            reached=state.reached,
            packed=self._packed,
            rates={group.name: self._recipe.lr * self._shared_rate for group in self._groups},
            trained=sum(p.numel() for g in self._groups for p in g.parameters.values()),
            attention=self._attention,
        )

    def _interval(self, tokens: int | None) -> int:
        """Steps for so many tokens, or for a twentieth of the run."""
        if tokens is None:
            return max(1, self.steps // _POINTS)
        return max(1, round(tokens / self._per_step))

    def _resume(self) -> None:
        found = checkpoints.latest(self._folder) if self._folder is not None else None
        if found is None:
            return
        self._state = _State(**checkpoints.load(found, self._accelerator))
        self._text.restore(self._state.data)
        self._say(f"continuing after {self._state.step} of {self.steps} steps")

    def _keep(self) -> None:
        if self._folder is None:
            return
        state = self._state
        state.data = self._text.state()
        plain = {key: getattr(state, key) for key in _State.__slots__}
        checkpoints.save(self._folder, self._accelerator, state.step, plain)

    def _step(self, step: int) -> None:
        """One step on the sequences of all passes and processes."""
        recipe, accelerator = self._recipe, self._accelerator
        for group, trained in zip(self._groups, self._optimizer.param_groups, strict=True):
            trained["lr"] = recipe.lr * self._shared_rate * self._rate(step, group)
        sequences = self._text.take(self._size)
        count = sum(int((sequence.targets != IGNORED).sum()) for sequence in sequences)
        # accelerate divides by the passes, and means over processes; both are undone
        scale = recipe.grad_accumulation * accelerator.num_processes / max(1, count)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self._share(sequences):
            with accelerator.accumulate(self.model):
                losses: Losses = self.model(*batch, self._weights(step))
                accelerator.backward(losses.total * scale)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip)
                self._optimizer.step()
                self._optimizer.zero_grad()
            sums += torch.stack((losses.kl, losses.ce)).double().cpu()
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        if not bool(torch.isfinite(sums).all()):
            raise VerificationError(
                f"the loss is not finite at step {step + 1}",
                hint="Lower --lr, or raise --warmup; the last checkpoint is kept.",
            )
        for index, value in enumerate((count, *sums.tolist())):
            self._state.sums[index] += value

    def _share(self, sequences: list[Batch]) -> Iterator[Batch]:
        """Batches of this process: in each pass, every process has its part of the sequences."""
        size, accelerator = self._recipe.batch, self._accelerator
        for first in range(0, self._size, size * accelerator.num_processes):
            begin = first + accelerator.process_index * size
            batch = stack(sequences[begin : begin + size])
            yield Batch(*(part.to(accelerator.device) for part in batch))

    def _first_phase(self) -> int:
        return round(self._recipe.first_phase * self.steps)

    def _rate(self, step: int, group: Group) -> float:
        recipe = self._recipe
        begin = self._first_phase() if group.late else 0
        return rate(step, self.steps, warmup=recipe.warmup, decay=recipe.decay, begin=begin)

    def _weights(self, step: int) -> Weights:
        recipe = self._recipe
        return Weights(
            recipe.kl, recipe.ce, recipe.hidden_mse if step < self._first_phase() else 0.0
        )

    def _measure(self, tokens: int) -> None:
        """Add a point to the curve."""
        state, recipe = self._state, self._recipe
        factor = self._rate(max(0, state.step - 1), self._groups[0])
        point = Point(tokens=tokens, rate=recipe.lr * self._shared_rate * factor)
        if state.sums[0]:
            point |= {"kl": state.sums[1] / state.sums[0], "ce": state.sums[2] / state.sums[0]}
            state.sums = [0.0, 0.0, 0.0]
        if self._held:
            kl, ce = self._evaluate()
            point |= {"eval_kl": kl, "eval_nll": ce}
        state.curve.append(point)
        self._report()

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Mean KL and negative log likelihood on the evaluation text; the same in all processes."""
        model: nn.Module = self.model
        device, size = self._accelerator.device, self._recipe.batch
        sums, count = torch.zeros(2, dtype=torch.float64), 0
        model.eval()
        for first in range(0, len(self._held), size):
            batch = stack(self._held[first : first + size])
            losses = model(*(part.to(device) for part in batch), Weights(1.0, 1.0, 0.0))
            sums += torch.stack((losses.kl, losses.ce)).double().cpu()
            count += int((batch.targets != IGNORED).sum())
        model.train()
        kl, ce = (sums / count).tolist()
        return kl, ce

    def _at_target(self) -> bool:
        target, point = self._recipe.kl_target, self._state.curve[-1]
        return target is not None and "eval_kl" in point and point["eval_kl"] <= target

    def _report(self) -> None:
        curve = self._state.curve
        point = curve[-1]
        names = {"kl": "KL", "ce": "loss", "eval_kl": "KL held out", "eval_nll": "loss held out"}
        found = [f"{name} {point[key]:.4f}" for key, name in names.items() if key in point]  # type: ignore[literal-required]
        self._say(f"{point['tokens']:,} tokens: " + ", ".join(found or ["begins"]))
        if len(curve) == _EARLY and (needed := tokens_to_recover(curve)) is not None:
            self._say(
                f"{100 * RECOVERED:.0f} % of the KL at the start should be recovered after about "
                f"{needed:,} tokens, by a power law through the points so far"
            )

    def _say(self, text: str) -> None:
        if self._note is not None and self._accelerator.is_main_process:
            self._note(text)
