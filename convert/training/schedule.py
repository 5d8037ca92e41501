"""Learning rates as a function of the step alone, so that a resumed run needs no state for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

__all__ = ["Decay", "rate"]

Decay = Literal["cosine", "linear", "constant"]
_DECAYS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def rate(step: int, steps: int, *, warmup: float, decay: Decay, begin: int = 0) -> float:
    """Factor of the learning rate at a step.

    Args:
        step: From 0 on.
        steps: In all.
        warmup: Share of the steps in which the rate rises, from the step after ``begin``.
        decay: How it falls from there to 0 at the end.
        begin: First step at which these parameters are trained; the factor is 0 before.

    Returns:
        Between 0 and 1; never 0 at a step that trains.
    """
    if step < begin:
        return 0.0
    rising = max(1, round(warmup * steps))
    risen = min(1.0, (step - begin + 1) / rising)
    done = max(0.0, (step + 1 - rising) / (steps + 1 - rising))
    return risen * _DECAYS[decay](min(done, 1.0))
