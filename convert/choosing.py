"""Choosing which neighbours share keys and values, by what each group would lose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.decoder import Decoder
from convert.execute import read_attention
from convert.facts import ModelFacts
from convert.layer import AttentionLayer
from convert.methods import Method
from convert.methods.fitting import second_moments
from convert.progress import LayerProgress
from convert.sharing import best_plan, groups_up_to
from convert.streams import solvable
from kvpatch.errors import UsageError

__all__ = ["choose_plan", "possible_plan"]


def possible_plan(facts: ModelFacts, share: int) -> tuple[int, ...]:
    """The plan with the most even groups between which ``choose_plan`` chooses; it needs no weight.

    Raises:
        UsageError: If the model's layers differ too much to share that often.
    """
    squares = {(start, end): float((end - start) ** 2) for start, end in _groups(facts, share)}
    return best_plan(facts, squares, -(-facts.layers // share))


def _groups(facts: ModelFacts, share: int) -> list[tuple[int, int]]:
    """Groups of layers that can share, as (first, end)."""
    # layer 0 sees embeddings alone, from which what a later layer reads is not linear
    possible = groups_up_to(facts, min(2 * share, facts.layers))
    groups = [(start, end) for start, end in possible if start]
    if not groups:
        raise UsageError(
            "no two adjacent layers of this model after layer 0 are of one kind, so none can share",
            hint="Merge the heads inside its layers: kvpatch gqa.",
        )
    return groups


_OBSERVED = 0.5  # of the look at a layer, about; the rest are merges of groups


@torch.no_grad()
def choose_plan(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    method: Method,
    *,
    share: int,
    tokens: Tensor | None,
    device: str,
    progress: Callable[[int], None],
) -> tuple[int, ...]:
    """The sharing plan that loses least with as many producers as a uniform plan would have.

    A group may have up to ``2 * share`` layers, so that others can be left alone; layer 0 always
    is. The loss of a group is what
    the method says that its layers lose together, as shares of key and value energy.

    Args:
        checkpoint: The open source; the attention of a few layers at a time is read.
        facts: Its attention.
        method: The conversion of a unit of layers.
        share: Layers for each set of keys and values, on average.
        tokens: [N, T] calibration windows, for the moments of the layers' inputs; None takes them
            as equal and white.
        device: Where calibration runs.
        progress: Called with the number of parts just looked at, as by ``LayerProgress``.

    Raises:
        UsageError: If the model's layers differ too much to share that often.
        InputModelError: If attention weights hold NaN or infinity, or the model cannot be run or
            gives such numbers.
    """
    groups = _groups(facts, share)
    decoder = None
    if tokens is not None:
        decoder = Decoder(checkpoint, facts, context=tokens.shape[1], device=device)
        stream = decoder.embed(tokens)
    assert method.convert is not None
    layers: dict[int, AttentionLayer] = {}
    inputs: dict[int, Tensor] = {}
    losses: dict[tuple[int, int], float] = {}
    work = LayerProgress(progress)
    for layer in range(facts.layers):
        ending = [(start, end) for start, end in groups if end == layer + 1]
        with work.layers(1), solvable([layer]):
            layers[layer] = read_attention(checkpoint, facts, layer, method.reads)
            if decoder is not None:
                assert tokens is not None
                tick = work.ticks(_OBSERVED, len(tokens))
                stream, inputs[layer], _ = decoder.observe(layer, stream, tick)
            tick = work.ticks(1 - _OBSERVED, len(ending) + 1)
            for start, end in [*ending, (layer, layer + 1)]:
                members = range(start, end)
                moments = second_moments([inputs[m] for m in members]) if inputs else None
                _, results = method.convert([layers[m] for m in members], moments)
                losses[start, end] = sum(
                    result["lost_energy_k"] + result["lost_energy_v"] for result in results
                )
                tick()
        for held in (layers, inputs):
            held.pop(layer + 1 - 2 * share, None)
    return best_plan(facts, losses, -(-facts.layers // share))
