"""Uptraining runs of several conversions, each told once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from convert.reporting.conversions import Conversion
from convert.reporting.measured import Training

__all__ = ["Run", "runs_of"]


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a conversion.

    Args:
        name: Of the conversion, and which of its runs it is if others followed.
        before: Tokens of the runs before it.
        training: What was done.
    """

    name: str
    before: int
    training: Training


def runs_of(conversions: Sequence[Conversion]) -> list[Run]:
    """All runs; one that was continued is told as that of the folder which it made, if possible."""
    runs: list[Run] = []
    for conversion in sorted(conversions, key=lambda found: len(found.trainings)):
        for run in _runs(conversion):
            if all((run.before, run.training) != (r.before, r.training) for r in runs):
                runs.append(run)
    return runs


def _runs(conversion: Conversion) -> list[Run]:
    trainings = conversion.trainings
    last = len(trainings) - 1
    return [
        Run(
            conversion.name if index == last else f"{conversion.name}, run {index + 1}",
            sum(earlier.tokens for earlier in trainings[:index]),
            training,
        )
        for index, training in enumerate(trainings)
    ]
