"""Means over samples, and paired differences between a model and its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["Mean", "paired_mean"]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over samples; with a source, also of its samples and of the differences.

    Standard errors are those of independent samples; None where there are fewer than two.

    Args:
        value: Mean of the model.
        error: Its standard error.
        source: Mean of the source on the same samples.
        difference: Mean of model less source.
        difference_error: Standard error of the difference, sample by sample; far smaller than
            that of two independent means, because both models find the same samples hard.
    """

    value: float
    error: float | None
    source: float | None = None
    difference: float | None = None
    difference_error: float | None = None


def paired_mean(ours: Sequence[float], theirs: Sequence[float] | None) -> Mean:
    """Mean of ``ours``, and of its differences from ``theirs`` of the same samples in order.

    Raises:
        ValueError: If both have different numbers of samples, or there is none.
    """
    if theirs is None:
        return Mean(fmean(ours), _standard_error(ours))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Mean(
        fmean(ours),
        _standard_error(ours),
        fmean(theirs),
        fmean(differences),
        _standard_error(differences),
    )


def _standard_error(samples: Sequence[float]) -> float | None:
    return stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else None
