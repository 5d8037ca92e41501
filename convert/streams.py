"""Text on its way through a model, layer after layer, while the layers are converted.

Two streams of hidden states go through the decoder. The first is that of the original model: it
gives the second moments of the attention's inputs, the scores and the outputs that a converted
layer should reproduce. The second runs through the layers converted so far, so that each refit also
repairs what earlier layers lost. One decoder layer is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.scratch import Scratch
from convert.decoder import Decoder
from convert.facts import ModelFacts
from convert.layer import AttentionLayer
from convert.methods import Converted
from convert.methods.attention import Scoring, plane_order, with_head_order
from convert.methods.fitting import Observed, similarity
from convert.plan import Plan
from convert.steps import Step
from kvpatch.errors import InputModelError

__all__ = [
    "WEIGHTS",
    "Converting",
    "Streams",
    "observe",
    "ready",
    "relative_error",
    "scoring_of",
    "side_by_side",
    "threads_for",
    "unit_name",
]

_SIMILARITY = "similarity"
_SMALL = 1024  # hidden width
WEIGHTS = tuple(
    field.name
    for field in dataclasses.fields(AttentionLayer)
    if field.name not in {"geometry", "rope"}
)


@dataclass(slots=True)
class Streams:
    """Hidden states [N, T, E] before the layer at hand, in the original and the converted model."""

    original: Tensor
    converted: Tensor


@dataclass(frozen=True, slots=True)
class Converting(ABC):
    """Converts all units of a plan and keeps them on disk until they are written.

    Args:
        plan: What to do.
        checkpoint: The open source.
        scratch: Where finished units go; those found there are not converted again.
        tokens: [N, T] calibration windows.
        refit_scores: Refit query and key projections.
        refit_output: Refit output projections.
        seed: Of everything random.
        device: Where the layers run and refits are computed.
    """

    plan: Plan
    checkpoint: Checkpoint
    scratch: Scratch
    tokens: Tensor
    refit_scores: bool
    refit_output: bool
    seed: int
    device: str

    @torch.no_grad()
    def run(self, progress: Callable[[int], None]) -> None:
        """Convert all units; afterwards ``unit`` has each of them.

        Args:
            progress: Called with the number of layers just done.

        Raises:
            InputModelError: If the model cannot be run, or gives numbers that are not finite.
        """
        steps = {step.layers: step for shard in self.plan.shards for step in shard.steps}
        units = sorted(unit for unit in steps if unit)
        if self.scratch.has(_SIMILARITY):
            return
        facts = self.plan.facts
        grams: list[Tensor] = []
        with threads_for(facts.geometry.hidden):
            tokens = self.tokens.shape[1]
            decoder = Decoder(self.checkpoint, facts, context=tokens, device=self.device)
            embedded = decoder.embed(self.tokens)
            streams = Streams(embedded, embedded.clone())
            for unit in units:
                grams += self.convert(steps[unit], decoder, streams)
                if not torch.isfinite(streams.converted).all():
                    raise InputModelError(
                        f"layer {unit[-1]} gives NaN or infinity on the calibration text once it "
                        "is converted: its numbers are too small or too large for float32",
                        hint="Convert it without --calibration.",
                    )
                progress(len(unit))
        self.scratch.keep(_SIMILARITY, {}, similarity(grams))

    def similarity(self) -> list[list[float]]:
        """How alike the attention inputs of each two layers are: see ``similarity``."""
        matrix: list[list[float]] = self.scratch.load(_SIMILARITY)[1]
        return matrix

    @abstractmethod
    def unit(self, layers: tuple[int, ...]) -> Converted:
        """The converted layers of a unit and what each of them lost."""

    @abstractmethod
    def convert(self, step: Step, decoder: Decoder, streams: Streams) -> list[Tensor]:
        """Convert the layers of a unit and lead both streams through them.

        Returns:
            Of each layer what ``similarity`` needs.
        """

    def observe(
        self, layer: int, original: AttentionLayer, decoder: Decoder, streams: Streams
    ) -> Observed:
        """Lead the original stream through a layer and take down what its attention does."""
        seen, streams.original = observe(
            self.plan.facts, layer, original, decoder, streams.original
        )
        return seen

    def output_target(self, seen: Observed, streams: Streams) -> Tensor:
        """What the attention should add for the streams to agree after it."""
        if self.plan.facts.family.attention_residual == "normed":
            return seen.outputs
        behind = seen.before - streams.converted
        return seen.outputs + behind / self.plan.facts.residual_multiplier

    def ready(self, layer: AttentionLayer) -> AttentionLayer:
        """A layer to compute with: float32, on the device, heads in plane order."""
        return ready(layer, self.device)

    def stored(self, layer: AttentionLayer, *, like: AttentionLayer) -> AttentionLayer:
        """A layer as it is written: in the dtypes and the order of ``like``."""
        back = with_head_order(layer, plane_order(layer).argsort().to(self.device))
        return _mapped(back, lambda t, name: t.cpu().to(getattr(like, name).dtype))


def ready(layer: AttentionLayer, device: str) -> AttentionLayer:
    """A layer to compute with: float32, on the device, heads in plane order."""
    return _mapped(with_head_order(layer, plane_order(layer)), lambda t, _: t.to(device).float())


def observe(
    facts: ModelFacts, number: int, original: AttentionLayer, decoder: Decoder, before: Tensor
) -> tuple[Observed, Tensor]:
    """Lead the original model's hidden states through a layer and take down what happens.

    Args:
        facts: The source.
        number: Which layer.
        original: The same layer.
        decoder: The model, which has seen a window.
        before: [N, T, E] hidden states that come in.

    Returns:
        What the layer did, and the hidden states [N, T, E] that go out.

    Raises:
        InputModelError: If these are not finite.
    """
    with decoder.block(number) as block:
        after, inputs, outputs = block.run_all(before)
    if not torch.isfinite(after).all():
        raise InputModelError(f"layer {number} gives NaN or infinity on the calibration text")
    observed = Observed(
        layer=ready(original, decoder.device),
        scoring=scoring_of(facts, number, decoder, before.shape[1]),
        query_order=tuple(range(facts.geometry.heads)),
        before=before,
        inputs=inputs,
        outputs=outputs,
    )
    return observed, after


def scoring_of(facts: ModelFacts, layer: int, decoder: Decoder, tokens: int) -> Scoring:
    """How a layer of the original model turns scores into weights.

    Args:
        facts: The source.
        layer: Which layer.
        decoder: The model, which has seen a window.
        tokens: Tokens of a window.
    """
    turn = decoder.turn(layer)
    place = torch.arange(tokens)
    distance = place[:, None] - place
    visible = (distance >= 0) & (distance < (facts.windows[layer] or tokens))
    return Scoring(
        visible=visible.to(decoder.device),
        turn=turn.to(decoder.device),
        scale=facts.scales[layer],
        softcap=facts.softcap,
        clip=facts.clip,
        norm=facts.qk_norm,
        norm_eps=facts.norm_eps,
    )


@contextmanager
def threads_for(hidden: int) -> Iterator[None]:
    """One torch thread for small models: sharing their operations out costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if hidden < _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(function: Callable[[int], None], numbers: range) -> None:
    """Call a function for each number on all cores, each with one torch thread of its own.

    So the result does not depend on the number of cores.
    """
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for done in [pool.submit(function, number) for number in numbers]:
                done.result()
        finally:
            torch.set_num_threads(threads)


def _mapped(layer: AttentionLayer, function: Callable[[Tensor, str], Tensor]) -> AttentionLayer:
    fields: dict[str, Any] = {
        name: function(getattr(layer, name), name)
        for name in WEIGHTS
        if getattr(layer, name) is not None
    }
    return dataclasses.replace(layer, **fields)


def unit_name(layers: Sequence[int]) -> str:
    """Name under which a finished unit is kept."""
    return f"layer-{layers[0]:05d}"


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Squared error relative to the power of what was wanted."""
    power = float(wanted.double().square().sum())
    return float((found - wanted).double().square().sum()) / power if power else 0.0
