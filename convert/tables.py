"""Measurements as tables of words, which the console and the model card both show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "retrieval_heading", "retrieval_tables", "task_table"]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first column names the row, all others hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def retrieval_heading(data: Mapping[str, Any]) -> str:
    """What was asked, and what came of it over all lengths and depths, in a sentence or two."""
    asked = (
        f"{data['text']} around keys of {data['key']}: {data['trials']} keys at every length and "
        f"depth (seed {data['seed']}, {data['dtype']})."
    )
    exact, gain = data["exact"], data["gain"]
    found = f"Found {_percent(exact['value'])}, gain {_nats(gain['value'])} nats"
    if gain["source"] is None:
        return f"{asked} {found}."
    return (
        f"{asked} {found}; the source {_percent(exact['source'])} and {_nats(gain['source'])}. "
        f"Difference {_differs(exact, 100)} points and {_differs(gain)} nats."
    )


def retrieval_tables(data: Mapping[str, Any]) -> list[Table]:
    """Tables [depth x length] of a probe: keys found, gain, and the gain less the source's."""
    source = " (source)" if data["gain"]["source"] is not None else ""
    tables = [
        _grid(data, f"keys found{source}", "exact", lambda mean: _with_source(mean, _percent)),
        _grid(
            data,
            f"gain in log likelihood from stating the key, nats{source}",
            "gain",
            lambda mean: _with_source(mean, _nats),
        ),
    ]
    if source:
        tables.append(_grid(data, "gain less that of the source, nats", "gain", _differs))
    return tables


def task_table(tasks: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each task and metric, with standard errors where there are any."""
    rows = [(task, metric, metric["mean"]) for task in tasks for metric in task["metrics"]]
    return Table(
        "tasks of lm-evaluation-harness",
        ["task", "metric", "examples", "questions", "score", "source", "difference"],
        [
            [
                task["task"],
                _metric_name(metric),
                str(task["fewshot"]),
                str(task["samples"]),
                f"{mean['value']:.4f}{_spread(mean['error'])}",
                "" if mean["source"] is None else f"{mean['source']:.4f}",
                ""
                if mean["difference"] is None
                else f"{mean['difference']:+.4f}{_spread(mean['difference_error'])}",
            ]
            for task, metric, mean in rows
        ],
    )


def _metric_name(metric: Mapping[str, Any]) -> str:
    name: str = metric["name"]
    return name if metric["filter"] == "none" else f"{name}, {metric['filter']}"


def _spread(error: float | None) -> str:
    return "" if error is None else f" \u00b1 {error:.4f}"


def _grid(
    data: Mapping[str, Any], title: str, measure: str, word: Callable[[Mapping[str, Any]], str]
) -> Table:
    cells = {(cell["length"], cell["depth"]): cell[measure] for cell in data["cells"]}
    return Table(
        title,
        ["depth", *(f"{length:,} tokens" for length in data["lengths"])],
        [
            [f"{depth:g} %", *(word(cells[length, depth]) for length in data["lengths"])]
            for depth in data["depths"]
        ],
    )


def _with_source(mean: Mapping[str, Any], word: Callable[[float], str]) -> str:
    ours = word(mean["value"])
    return ours if mean["source"] is None else f"{ours} ({word(mean['source'])})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _nats(number: float) -> str:
    return f"{number:.2f}"


def _differs(mean: Mapping[str, Any], factor: float = 1) -> str:
    """The paired difference with its standard error, if there is one."""
    error = mean["difference_error"]
    spread = "" if error is None else f" \u00b1 {factor * error:.2f}"
    return f"{factor * mean['difference']:+.2f}{spread}"
