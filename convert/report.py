"""A report on converted checkpoints: plots, the rows behind them, and a page, without any model."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint.writer import write_file
from convert.console import visible
from convert.reporting.charts import Chart, charts_of
from convert.reporting.conversions import Conversion, by_source, read_conversions
from convert.reporting.figures import render
from convert.reporting.page import Study, render_page
from convert.reporting.project import find_outputs
from convert.reporting.rows import Row
from kvpatch.errors import OutputError, UsageError

__all__ = ["Report", "write_report"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was written.

    Args:
        files: Three for each plot, PNG, SVG and CSV, and the page; as far as they were wanted.
        rows: The rows behind each plot, by its name; those of the second source end in ``-2``.
    """

    files: list[Path]
    rows: dict[str, list[Row]]


def write_report(
    folders: Sequence[Path],
    *,
    to: Path | None,
    html: Path | None,
    overwrite: bool,
    warn: Callable[[str], None],
) -> Report:
    """Draw what conversions cost and keep, and how they were trained.

    Everything is drawn before anything is written, and equal manifests give equal bytes.

    Args:
        folders: Converted checkpoints, or folders that hold some; only ``kvpatch.json`` is read.
        to: Folder to make for the plots and tables of the conversions of one source.
        html: Page to write of all conversions.
        overwrite: Replace a page, and write into a folder that is there; its other files stay.
        warn: Called with each warning.

    Raises:
        UsageError: If there is nothing to write; for plots, also if nothing was evaluated against
            the source, or sources differ.
        InputModelError: If a folder has no manifest, or one that is damaged.
        OutputError: If an output exists (without ``overwrite``), or is of the wrong kind.
    """
    _check_targets(to, html, overwrite=overwrite)
    conversions = read_conversions(find_outputs(folders, warn))
    for conversion in _not_evaluated(conversions):
        warn(
            f"{visible(conversion.name)} has no saved evaluation against its source and is left "
            "out of the plot of cache size and KL"
        )
    studies = [Study(group, charts_of(group)) for group in by_source(conversions)]
    files: dict[Path, bytes] = {}
    if to is not None:
        files |= _plots(to, _only(studies))
    if html is not None:
        files[html] = render_page(studies)
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, content)
    return Report(list(files), _rows(studies))


def _check_targets(to: Path | None, html: Path | None, *, overwrite: bool) -> None:
    if to is None and html is None:
        raise UsageError("nothing to write", hint="Give --to FOLDER, --html FILE, or both.")
    if to is not None and to.exists() and not to.is_dir():
        raise OutputError(f"{to} exists and is not a folder", hint="Choose another --to.")
    if to is not None and to.exists() and not overwrite:
        raise OutputError(
            f"{to} exists",
            hint="Choose another --to, or --overwrite to replace the plots in it.",
        )
    if html is not None and html.is_dir():
        raise OutputError(f"{html} is a folder", hint="Give --html the name of a file.")
    if html is not None and html.exists() and not overwrite:
        raise OutputError(
            f"{html} exists", hint="Choose another --html, or --overwrite to replace it."
        )


def _not_evaluated(conversions: Sequence[Conversion]) -> list[Conversion]:
    return [c for c in conversions if all(e.against is None for e in c.evaluations)]


def _only(studies: Sequence[Study]) -> Study:
    """The study, if plots can be made of it.

    Raises:
        UsageError: If there are several, or nothing was evaluated.
    """
    first, *others = (study.conversions[0] for study in studies)
    for other in others:
        raise UsageError(
            f"{first.name} and {other.name} have different sources ({first.source.name} and "
            f"{other.source.name}; the sha256 of their weights differ)",
            hint="Conversions can be compared if they have one source: make a report of each, or "
            "a page of all with --html.",
        )
    if len(_not_evaluated(studies[0].conversions)) == len(studies[0].conversions):
        raise UsageError(
            "none of these checkpoints has a saved evaluation against its source",
            hint="Run: kvpatch eval OUT --text FILE --against SOURCE --save",
        )
    return studies[0]


def _plots(to: Path, study: Study) -> dict[Path, bytes]:
    files: dict[Path, bytes] = {}
    for chart in study.charts:
        for suffix, content in render(chart.draw).items():
            files[to / f"{chart.name}.{suffix}"] = content
        files[to / f"{chart.name}.csv"] = _csv(chart.rows)
    return files


def _rows(studies: Sequence[Study]) -> dict[str, list[Row]]:
    """Rows by the name of their chart."""
    return {
        f"{chart.name}{_suffix(index, chart)}": chart.rows
        for index, study in enumerate(studies)
        for chart in study.charts
    }


def _suffix(index: int, chart: Chart) -> str:
    """What tells apart the charts of several sources; those of one conversion have its name."""
    return f"-{index + 1}" if index and not chart.about else ""


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
