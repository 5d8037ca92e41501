"""Sharing plans: which layer's keys and values each layer reads.

A plan is a list with one entry for each layer, the index of the layer whose keys and values it
reads: ``kv_source_layers`` in the config of the result. A layer that reads its own produces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from convert.facts import ModelFacts
from kvpatch.errors import UsageError

__all__ = ["best_plan", "can_share", "groups_up_to", "parse_layers", "uniform_plan"]


def parse_layers(text: str, layers: int, *, auto: bool = True) -> tuple[int, int]:
    """First layer and end of a range such as ``8:24``; either side may be left out.

    Args:
        text: The range.
        layers: Of the model.
        auto: Whether the command knows ``--layers auto`` too.

    Raises:
        UsageError: If it is no range of the model's layers.
    """
    start, separator, stop = text.partition(":")
    numbers = [part for part in (start, stop) if part]
    if separator and all(part.isdecimal() for part in numbers):
        first, end = int(start or 0), int(stop or layers)
        if first < end <= layers:
            return first, end
    raise UsageError(
        f"--layers {text} is no range of the {layers} layers of this model",
        hint=f"Give --layers FIRST:END such as 0:{layers}{', or auto' if auto else ''}.",
    )


def uniform_plan(
    facts: ModelFacts, share: int, first: int, end: int, *, auto: bool = True
) -> tuple[int, ...]:
    """Groups of ``share`` adjacent layers; a first, shorter group takes what does not divide.

    That is where Brandon et al. (arXiv:2405.12981, figure 2) put it, so that layer 0, whose keys
    and values are needed most, shares least.

    Args:
        facts: The source.
        share: Layers for each set of keys and values.
        first: First layer that takes part.
        end: Layer after the last that does.
        auto: Whether the command knows ``--layers auto`` too.

    Raises:
        UsageError: If two layers of a group are of different kinds.
    """
    count = end - first
    if count < 2:
        raise UsageError(
            f"--layers {first}:{end} is one layer, which has none to share with",
            hint="Give a range of two layers or more.",
        )
    starts = [first, *range(first + (count % share or share), end, share)]
    sources = list(range(facts.layers))
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        sources[start:stop] = [start] * (stop - start)
        wrong = [layer for layer in range(start + 1, stop) if not can_share(facts, start, layer)]
        if wrong:
            raise UsageError(
                f"layers {start} and {wrong[0]} of this model cannot share keys and values: one "
                "has another window or other positions",
                hint="Choose --layers auto, which shares between layers of one kind alone."
                if auto
                else "Give --share and --layers FIRST:END so that layers of one kind share.",
            )
    return tuple(sources)


def can_share(facts: ModelFacts, producer: int, consumer: int) -> bool:
    """Whether a layer sees the same positions, in the same way, as another."""
    return (
        facts.windows[producer] == facts.windows[consumer]
        and facts.ropes[producer] == facts.ropes[consumer]
    )


def best_plan(
    facts: ModelFacts, losses: Mapping[tuple[int, int], float], producers: int
) -> tuple[int, ...]:
    """The groups of adjacent layers that lose least in sum, by dynamic programming.

    Args:
        facts: The source.
        losses: Predicted loss of a group, by its first layer and the layer after its last; groups
            that are not there are not formed, but a layer on its own then loses nothing.
        producers: Layers that keep keys and values; layer 0 is one of them.

    Raises:
        UsageError: If no plan has so few producers.
    """
    unreachable = float("inf")
    # cheapest[n][end]: least loss of layers [0, end) in n groups, and where the last one starts
    cheapest: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(producers):
        row: dict[int, tuple[float, int]] = {}
        for start, (loss, _) in cheapest[-1].items():
            grouped = {end: cost for (first, end), cost in losses.items() if first == start}
            ends = ({start + 1: 0.0} | grouped).items()
            for end, cost in ends:
                if end <= facts.layers and loss + cost < row.get(end, (unreachable, 0))[0]:
                    row[end] = (loss + cost, start)
        cheapest.append(row)
    if facts.layers not in cheapest[producers]:
        raise UsageError(
            f"no plan keeps the keys and values of {producers} of the {facts.layers} layers",
            hint="Choose a larger --share for larger groups, or give --layers FIRST:END.",
        )
    sources, end = list(range(facts.layers)), facts.layers
    for count in range(producers, 0, -1):
        start = cheapest[count][end][1]
        sources[start:end] = [start] * (end - start)
        end = start
    return tuple(sources)


def groups_up_to(facts: ModelFacts, largest: int) -> Sequence[tuple[int, int]]:
    """All groups of 2 to ``largest`` adjacent layers of one kind, as (first, end)."""
    return [
        (start, start + size)
        for start in range(facts.layers)
        for size in range(2, largest + 1)
        if start + size <= facts.layers
        and all(can_share(facts, start, layer) for layer in range(start, start + size))
    ]
