"""Text on its way through a model, layer after layer, while the layers are converted.

Two streams of hidden states go through the decoder. The first is that of the original model: it
gives the second moments of the attention's inputs, the scores and the outputs that a converted
layer should reproduce. The second runs through the layers converted so far, so that each refit also
repairs what earlier layers lost. One decoder layer is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.scratch import Scratch
from convert.decoder import Decoder
from convert.facts import ModelFacts
from convert.layer import AttentionLayer, LatentLayer
from convert.methods import Converted
from convert.methods.attention import Scoring, plane_order, with_head_order
from convert.methods.fitting import Observed
from convert.methods.least_squares import Tick, no_tick
from convert.methods.similarity import similarity
from convert.plan import Plan
from convert.progress import LayerProgress
from convert.resources import available_cores
from convert.steps import Step
from kvpatch.errors import InputModelError, VerificationError

__all__ = [
    "WEIGHTS",
    "Converting",
    "Streams",
    "checked",
    "observe",
    "ready",
    "relative_error",
    "scoring_of",
    "side_by_side",
    "solvable",
    "threads_for",
    "unit_name",
]

_Layer = TypeVar("_Layer", AttentionLayer, LatentLayer)
_SIMILARITY = "similarity"
_SMALL = 1024  # hidden width
# shares of the work on a layer that is converted with both refits, about: they change with the
# widths and the tokens
OBSERVED, MERGED, INPUTS, SCORES, OUTCOME, AFTER = 0.15, 0.1, 0.05, 0.4, 0.2, 0.1
_SIGN_SECONDS = 1.0  # between reports of what other threads do
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
            progress: Called with the number of parts just done, as by ``LayerProgress``.

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
            work = LayerProgress(progress)
            for unit in units:
                with work.layers(len(unit)), solvable(unit):
                    grams += self.convert(steps[unit], decoder, streams, work)
        self.scratch.keep(_SIMILARITY, {}, similarity(grams))

    def similarity(self) -> list[list[float]]:
        """How alike the attention inputs of each two layers are: see ``similarity``."""
        matrix: list[list[float]] = self.scratch.load(_SIMILARITY)[1]
        return matrix

    @abstractmethod
    def unit(self, layers: tuple[int, ...]) -> Converted:
        """The converted layers of a unit and what each of them lost."""

    @abstractmethod
    def convert(
        self, step: Step, decoder: Decoder, streams: Streams, work: LayerProgress
    ) -> list[Tensor]:
        """Convert the layers of a unit and lead both streams through them.

        Returns:
            Of each layer what ``similarity`` needs.
        """

    def observe(
        self,
        layer: int,
        original: AttentionLayer,
        decoder: Decoder,
        streams: Streams,
        work: LayerProgress,
    ) -> Observed:
        """Lead the original stream through a layer and take down what its attention does."""
        tick = work.ticks(OBSERVED, len(self.tokens))
        seen, streams.original = observe(
            self.plan.facts, layer, original, decoder, streams.original, tick=tick
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
    facts: ModelFacts,
    number: int,
    original: AttentionLayer,
    decoder: Decoder,
    before: Tensor,
    *,
    tick: Tick,
) -> tuple[Observed, Tensor]:
    """Lead the original model's hidden states through a layer and take down what happens.

    Args:
        facts: The source.
        number: Which layer.
        original: The same layer.
        decoder: The model, which has seen a window.
        before: [N, T, E] hidden states that come in.
        tick: Called after each window.

    Returns:
        What the layer did, and the hidden states [N, T, E] that go out.

    Raises:
        InputModelError: If these are not finite.
    """
    after, inputs, outputs = decoder.observe(number, before, tick)
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


def checked(numbers: Sequence[int], layers: list[_Layer]) -> list[_Layer]:
    """Converted layers, all of whose weights must be finite.

    Args:
        numbers: Which layers.
        layers: The same.

    Raises:
        VerificationError: If a weight is not; that of the source was.
    """
    for number, layer in zip(numbers, layers, strict=True):
        for field in dataclasses.fields(layer):
            weight = getattr(layer, field.name)
            if isinstance(weight, Tensor) and not torch.isfinite(weight).all():
                dtype = str(weight.dtype).removeprefix("torch.")
                raise VerificationError(
                    f"the converted layer {number} overflows in {dtype} ({field.name})",
                    hint="Choose --dtype bfloat16 or float32; if that does not help, --refit none.",
                )
    return layers


@contextmanager
def solvable(layers: Sequence[int]) -> Iterator[None]:
    """Name the layers whose numbers decompositions fail on.

    Raises:
        InputModelError: If one fails: finite numbers can be too large for their products.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        named = ", ".join(map(str, layers))
        raise InputModelError(
            f"the weights or activations of layer {named} are too large, too small or too much "
            f"alike to be decomposed: {error}",
            hint="Use a sound checkpoint. If this one is, run with --debug and report it.",
        ) from error


def side_by_side(
    function: Callable[[int], None], numbers: range, *, work: LayerProgress, tick: Tick = no_tick
) -> None:
    """Call a function for each number on all cores, each with one torch thread of its own.

    So the result does not depend on the number of cores.

    Args:
        function: What to call.
        numbers: With what.
        work: What the function may tick; it is reported here meanwhile.
        tick: Called after each call of the function.
    """

    def ticked(number: int) -> None:
        function(number)
        tick()

    threads, cores = torch.get_num_threads(), available_cores()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            left = {pool.submit(ticked, number) for number in numbers}
            while left:
                done, left = wait(left, timeout=_SIGN_SECONDS, return_when=FIRST_COMPLETED)
                for one in done:
                    one.result()
                work.report()
        finally:  # after an error or a signal nobody wants what has not begun
            pool.shutdown(wait=False, cancel_futures=True)
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
