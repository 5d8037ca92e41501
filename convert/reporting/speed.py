"""The plot of ``kvpatch bench``: tokens per second and bytes of each run, as bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.checkpoint.writer import write_file
from convert.reporting.figures import COLOURS, figure_of, render, short
from kvpatch.errors import OutputError, UsageError
from kvpatch.memory import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot", "speed", "write_plot"]

_FORMATS = (".png", ".svg")
# title, key of a run, how its number is written
_PANELS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("prefill, tokens/s", "prefill_tokens_per_second", "{:,.0f}".format),
    ("decoding, tokens/s", "decode_tokens_per_second", "{:,.1f}".format),
    ("KV cache", "cache_bytes", format_bytes),
    ("peak memory", "peak_bytes", format_bytes),
)


def check_plot(file: Path) -> Path:
    """The file, if a plot can be written there.

    Raises:
        UsageError: Its ending is not that of a format.
        OutputError: It exists.
    """
    if file.suffix not in _FORMATS:
        raise UsageError(f"--plot {file}: its name must end in {' or '.join(_FORMATS)}")
    if file.exists():
        raise OutputError(f"{file} exists", hint="Choose another name.")
    return file


def write_plot(bench: Mapping[str, Any], file: Path) -> None:
    """Draw measurements into a file.

    Args:
        bench: As of ``convert.bench``, in plain types.
        file: From ``check_plot``.
    """
    write_file(file, render(partial(speed, bench))[file.suffix.removeprefix(".")])


def speed(bench: Mapping[str, Any]) -> Figure:
    """A panel for each measure, a bar in it for each run."""
    runs = bench["runs"]
    panels = [panel for panel in _PANELS if all(run[panel[1]] is not None for run in runs)]
    title = (
        f"{bench['batch']} x {bench['prompt']:,} tokens of prompt, {bench['new']:,} new; "
        f"{bench['dtype']} on {bench['device']}"
    )
    figure = figure_of(2.6 * len(panels) + 2.2, 0.42 * len(runs) + 1.2, title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
    for panel, (name, key, text) in zip(axes, panels, strict=True):
        _bars(panel, runs, key, text)
        panel.set_title(name)
    axes[0].set_yticks(range(len(runs)), [_label(run) for run in runs])
    axes[0].invert_yaxis()
    return figure


def _label(run: Mapping[str, Any]) -> str:
    return f"{short(run['model'].rstrip('/').rpartition('/')[2])}, {run['attention']}"


def _bars(
    panel: Axes, runs: Sequence[Mapping[str, Any]], key: str, text: Callable[[float], str]
) -> None:
    """Bars from 0, one colour for each model, with their numbers."""
    models = list(dict.fromkeys(run["model"] for run in runs))
    bars = panel.barh(
        range(len(runs)),
        [run[key] for run in runs],
        height=0.7,
        color=[COLOURS[models.index(run["model"]) % len(COLOURS)] for run in runs],
        hatch=["//" if run["attention"] == "patched" else "" for run in runs],
        edgecolor="white",
    )
    panel.bar_label(bars, [text(run[key]) for run in runs], padding=3)
    panel.set_xlim(0, 1.45 * max(run[key] for run in runs))
    panel.set_xticks([])
    panel.spines[["top", "right", "bottom"]].set_visible(False)
