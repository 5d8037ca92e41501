"""The plot of an uptraining run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["training_curve"]

_TRAINING, _HELD_OUT = "#56B4E9", "#D55E00"  # of Okabe and Ito, as in all plots
# panel, key of a point while training, key on the evaluation text
_PANELS = (("KL to the teacher", "kl", "eval_kl"), ("cross entropy", "ce", "eval_nll"))


def training_curve(training: Mapping[str, Any]) -> Figure:
    """Losses against tokens, on the training text and on the one that was held out.

    Args:
        training: One entry of ``trainings`` in kvpatch.json.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    points = training["curve"]
    shown = [
        panel
        for panel in _PANELS
        if any(point.get(key, 0) for point in points for key in panel[1:])
    ]
    figure = Figure(figsize=(4.6 * len(shown), 3.4), layout="constrained")
    figure.suptitle(f"{training['tokens']:,} tokens of {training['data']['name']}")
    for axes, (title, *keys) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        for key, colour, label in zip(
            keys, (_TRAINING, _HELD_OUT), ("training", "held out"), strict=True
        ):
            found = [(point["tokens"], point[key]) for point in points if key in point]
            if found:
                axes.plot(*zip(*found, strict=True), color=colour, marker=".", label=label)
        axes.set(title=title, xlabel="tokens", ylabel="nats per token")
        if title.startswith("KL"):
            axes.set_yscale("log")
        axes.legend(frameon=False)
    return figure
