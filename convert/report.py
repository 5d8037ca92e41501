"""A report on converted checkpoints: plots and the rows behind them, without loading a model."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from convert.checkpoint.writer import write_file
from convert.console import visible
from convert.reporting import plots
from convert.reporting.conversions import (
    Conversion,
    LatentConversion,
    MergedConversion,
    read_conversions,
)
from convert.reporting.rows import (
    Row,
    latent_rows,
    lost_energy_rows,
    pareto_rows,
    similarity_rows,
)
from kvpatch.errors import OutputError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "write_report"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was written.

    Args:
        files: Three for each plot: PNG, SVG and CSV.
        rows: The rows behind each plot, by its name.
    """

    files: list[Path]
    rows: dict[str, list[Row]]


@dataclass(frozen=True, slots=True)
class _Chart:
    """A plot, by the name of its files, and the rows behind it."""

    name: str
    rows: list[Row]
    draw: Callable[[], Figure]


def write_report(
    folders: Sequence[Path], to: Path, *, overwrite: bool, warn: Callable[[str], None]
) -> Report:
    """Draw cache size against KL, and for each conversion its lost energy and layer similarity.

    Everything is drawn before anything is written, and equal manifests give equal bytes.

    Args:
        folders: Converted checkpoints of one source; of each only ``kvpatch.json`` is read.
        to: Folder to make.
        overwrite: Write into a folder that is there; its other files stay.
        warn: Called with each warning.

    Raises:
        UsageError: If nothing was evaluated against the source, or sources differ.
        InputModelError: If a folder has no manifest, or one that is damaged.
        OutputError: If ``to`` exists (without ``overwrite``), or is a file.
    """
    _check_target(to, overwrite=overwrite)
    conversions = read_conversions(folders)
    for conversion in _not_evaluated(conversions):
        warn(
            f"{visible(conversion.name)} has no saved evaluation against its source and is left "
            "out of the plot of cache size and KL"
        )
    charts = _charts(conversions)
    files: dict[Path, bytes] = {}
    for chart in charts:
        for suffix, content in plots.render(chart.draw).items():
            files[to / f"{chart.name}.{suffix}"] = content
        files[to / f"{chart.name}.csv"] = _csv(chart.rows)
    to.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_file(file, content)
    return Report(list(files), {chart.name: chart.rows for chart in charts})


def _check_target(to: Path, *, overwrite: bool) -> None:
    if to.exists() and not to.is_dir():
        raise OutputError(f"{to} exists and is not a folder", hint="Choose another --to.")
    if to.exists() and not overwrite:
        raise OutputError(
            f"{to} exists",
            hint="Choose another --to, or --overwrite to replace the plots in it.",
        )


def _not_evaluated(conversions: Sequence[Conversion]) -> list[Conversion]:
    """The conversions that were not evaluated against the source; there must be others."""
    missing = [c for c in conversions if all(e.against is None for e in c.evaluations)]
    if len(missing) == len(conversions):
        raise UsageError(
            "none of these checkpoints has a saved evaluation against its source",
            hint="Run: kvpatch eval OUT --text FILE --against SOURCE --save",
        )
    return missing


def _charts(conversions: Sequence[MergedConversion | LatentConversion]) -> list[_Chart]:
    measured = pareto_rows(conversions)
    charts = [_Chart("pareto", measured, partial(plots.pareto, measured))]
    for conversion in conversions:
        charts.append(_lost_energy(conversion))
        similar = similarity_rows(conversion)
        if similar:
            draw = partial(plots.similarity, conversion)
            charts.append(_Chart(f"similarity-{conversion.name}", similar, draw))
    return charts


def _lost_energy(conversion: MergedConversion | LatentConversion) -> _Chart:
    name = f"lost-energy-{conversion.name}"
    if isinstance(conversion, LatentConversion):
        return _Chart(name, latent_rows(conversion), partial(plots.latent_energy, conversion))
    return _Chart(name, lost_energy_rows(conversion), partial(plots.lost_energy, conversion))


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
