"""What is measured during training, and what it says about how much more is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

__all__ = ["Point", "tokens_to_recover"]

RECOVERED = 0.9  # share of the loss that the estimate is about
_FAR = 1000  # times the tokens so far; beyond that a power law says nothing


class Point(TypedDict):
    """State of a run after some tokens; all in nats per token.

    ``kl`` and ``ce`` are means over the training tokens since the last point, ``eval_*`` those of
    the evaluation text.
    """

    tokens: int
    rate: float
    kl: NotRequired[float]
    ce: NotRequired[float]
    eval_kl: NotRequired[float]
    eval_nll: NotRequired[float]


def tokens_to_recover(curve: Sequence[Point], share: float = RECOVERED) -> int | None:
    """Tokens after which so much of the KL at the start should be won back.

    A power law is fitted to the evaluated KL by least squares of logarithms, and read on. It is a
    rough number: schedules bend the curve, and no law holds for ever.

    Args:
        curve: Points of a run, the first one before training.
        share: Of the KL at the start.

    Returns:
        Tokens, counted from the start; None with fewer than two points of training, or if it would
        take more than a thousand times the tokens so far.
    """
    points = [(point["tokens"], point["eval_kl"]) for point in curve if "eval_kl" in point]
    if len(points) < 3 or points[0][0] or min(kl for _, kl in points) <= 0:
        return None
    goal = math.log((1 - share) * points[0][1])
    places = [(math.log(tokens), math.log(kl)) for tokens, kl in points[1:]]
    x, y = (sum(axis) / len(places) for axis in zip(*places, strict=True))
    spread = sum((a - x) ** 2 for a, _ in places)
    slope = sum((a - x) * (b - y) for a, b in places) / spread
    reached = [tokens for tokens, kl in points if math.log(kl) <= goal]
    if reached:
        return reached[0]
    if slope >= 0:
        return None
    exponent = x + (goal - y) / slope
    return round(math.exp(exponent)) if exponent < math.log(_FAR * points[-1][0]) else None
