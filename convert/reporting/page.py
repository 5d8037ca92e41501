"""A report as one HTML page: without scripts, complete in itself, the same bytes each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import jinja2

from convert.console import visible
from convert.reporting import summary
from convert.reporting.charts import Chart
from convert.reporting.conversions import LatentConversion, MergedConversion, by_conversion
from convert.reporting.inline import inline_svg
from convert.reporting.runs import runs_of
from kvpatch import __version__

__all__ = ["Study", "render_page"]


@dataclass(frozen=True, slots=True)
class Study:
    """The conversions of one source, and their plots."""

    conversions: Sequence[MergedConversion | LatentConversion]
    charts: Sequence[Chart]


def render_page(studies: Sequence[Study]) -> bytes:
    """The page.

    Args:
        studies: At least one.
    """
    numbers = count(1)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convert"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    template = environment.get_template("report.html.jinja")
    text = template.render(
        version=__version__, studies=[_content(study, numbers) for study in studies]
    )
    return text.encode()


def _shown(value: Any) -> Any:
    """Names come from files: what would not be seen in them is spelled out."""
    return visible(value) if type(value) is str else value


def _content(study: Study, numbers: Iterator[int]) -> Mapping[str, Any]:
    """What the template shows of a study."""
    conversions = study.conversions
    figures = [
        (chart, inline_svg(chart.draw, prefix=f"p{number}-", alt=visible(chart.alt)))
        for chart, number in zip(study.charts, numbers, strict=False)
    ]
    runs = runs_of(conversions)
    return {
        "source": conversions[0].source.name,
        "facts": summary.source_facts(conversions),
        "files": summary.source_files(conversions),
        "variants": summary.variant_table(conversions),
        "pareto": [drawn for chart, drawn in figures if chart.kind == "pareto"],
        "training": [drawn for chart, drawn in figures if chart.kind == "training"],
        "runs": summary.training_table(runs) if runs else None,
        "evaluations": summary.evaluation_table(conversions),
        "probes": list(summary.probes(conversions)),
        "tasks": list(summary.task_tables(conversions)),
        "losses": _losses(conversions, figures),
        "origins": [
            {
                "name": one.name,
                "facts": summary.provenance(one),
                "recipe": summary.recipe_text(one),
            }
            for one in conversions
        ],
    }


def _losses(
    conversions: Sequence[MergedConversion | LatentConversion], figures: Sequence[tuple[Chart, str]]
) -> list[Mapping[str, Any]]:
    """What was lost: one entry for all that lost the same."""
    return [
        {
            "names": [one.name for one in same],
            "kind": same[0].kind,
            "figures": [drawn for chart, drawn in figures if chart.about == same[0].name],
        }
        for same in by_conversion(conversions)
    ]
