"""The plots of uptraining: one run on its own, and all runs of a report together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convert.reporting.figures import COLOURS, MARKERS, figure_of, short
from convert.reporting.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["training_curve", "training_runs"]

_TRAINING, _HELD_OUT = COLOURS[5], COLOURS[1]
# panel, key of a point while training, key on the evaluation text
_PANELS = (("KL to the teacher", "kl", "eval_kl"), ("cross entropy", "ce", "eval_nll"))
_MEASURES = (("KL to the teacher", "kl"), ("cross entropy", "ce"))


def training_curve(training: Mapping[str, Any]) -> Figure:
    """Losses against tokens, on the training text and on the one that was held out.

    Args:
        training: One entry of ``trainings`` in kvpatch.json.
    """
    points = training["curve"]
    shown = [
        panel
        for panel in _PANELS
        if any(point.get(key, 0) for point in points for key in panel[1:])
    ]
    title = f"{training['tokens']:,} tokens of {training['data']['name']}"
    figure = figure_of(4.6 * len(shown), 3.4, title)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (name, *keys) in zip(panels, shown, strict=True):
        looks = zip(keys, (_TRAINING, _HELD_OUT), ("training", "held out"), strict=True)
        for key, colour, label in looks:
            found = [(point["tokens"], point[key]) for point in points if key in point]
            if found:
                panel.plot(*zip(*found, strict=True), color=colour, marker=".", label=label)
        _loss_axes(panel, name)
        panel.legend(frameon=False)
    return figure


def training_runs(rows: Sequence[Row]) -> Figure:
    """Losses of several runs against tokens: a row for each text, a column for each measure.

    Runs that held out no text are shown by their loss on what they were trained on.

    Args:
        rows: From ``training_rows``.
    """
    texts: dict[str, list[Row]] = {}
    for row in rows:
        texts.setdefault(_text(row), []).append(row)
    names = list(dict.fromkeys(row["run"] for row in rows))
    width = 9.2 + 0.085 * max(len(short(name)) for name in names)
    figure = figure_of(width, 3.2 * len(texts) + 0.4, "Uptraining")
    panels = figure.subplots(len(texts), len(_MEASURES), squeeze=False)
    drawn: dict[str, Line2D] = {}
    for line, (text, measured) in zip(panels, texts.items(), strict=True):
        for panel, (title, key) in zip(line, _MEASURES, strict=True):
            drawn |= _draw_runs(panel, measured, key, names)
            _loss_axes(panel, f"{title}\n{text}")
    legend = [(drawn[name], short(name)) for name in names if name in drawn]
    figure.legend(*zip(*legend, strict=True), loc="outside right center", frameon=False)
    return figure


def _text(row: Row) -> str:
    """What the losses of a row are comparable in, in two lines."""
    if row["held_out"] is None:
        return f"while training on {short(row['data'])}"
    size = f"up to {row['samples']} sequences of {row['context']} tokens"
    return f"{short(row['held_out'])}, {size}"


def _draw_runs(
    panel: Axes, rows: Sequence[Row], key: str, names: Sequence[str]
) -> dict[str, Line2D]:
    """A line for each run that has the measure, by its name."""
    key = key if rows[0]["held_out"] is None else f"held_out_{key}"
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row[key]:  # 0 in all points of a run without a teacher
            found.setdefault(row["run"], []).append((row["tokens"], row[key]))
    return {
        name: panel.plot(*zip(*points, strict=True), **_look(names.index(name)))[0]
        for name, points in found.items()
    }


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
    }


def _loss_axes(panel: Axes, title: str) -> None:
    panel.set(title=title, xlabel="tokens", ylabel="nats per token")
    panel.xaxis.set_major_formatter("{x:,.0f}")
    if not panel.lines:
        panel.set_axis_off()
    elif title.startswith("KL"):
        _log_axis(panel)


def _log_axis(panel: Axes) -> None:
    """Ticks at 1, 2, 3 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=[1.0, 2.0, 3.0, 5.0]))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
