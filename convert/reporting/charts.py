"""Which plots a report has of the conversions of one source, what is behind them, and in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from convert.reporting import plots
from convert.reporting.conversions import (
    Conversion,
    LatentConversion,
    MergedConversion,
    by_conversion,
)
from convert.reporting.rows import (
    Row,
    latent_rows,
    lost_energy_rows,
    pareto_rows,
    similarity_rows,
    training_rows,
)
from convert.reporting.runs import runs_of
from convert.reporting.training import training_runs
from kvpatch.memory import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Chart", "charts_of"]


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot.

    Args:
        kind: ``pareto``, ``training``, ``lost-energy`` or ``similarity``.
        about: The conversion; empty if it is about all of them.
        alt: What it shows, for those who do not see it.
        rows: What is behind it.
        draw: Makes the figure.
    """

    kind: str
    about: str
    alt: str
    rows: list[Row]
    draw: Callable[[], Figure]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.kind}-{self.about}" if self.about else self.kind


def charts_of(conversions: Sequence[MergedConversion | LatentConversion]) -> list[Chart]:
    """All plots that can be drawn of the conversions of one source; of equal ones the first."""
    charts = list(_of_all(conversions))
    for first, *_ in by_conversion(conversions):
        charts += _of_one(first, drawn=[chart.rows for chart in charts])
    return charts


def _of_all(conversions: Sequence[Conversion]) -> Iterator[Chart]:
    measured = pareto_rows(conversions)
    if measured:
        yield Chart(
            "pareto", "", _pareto_words(measured), measured, partial(plots.pareto, measured)
        )
    trained = training_rows(runs_of(conversions))
    if trained:
        yield Chart(
            "training", "", _training_words(trained), trained, partial(training_runs, trained)
        )


def _of_one(
    conversion: MergedConversion | LatentConversion, *, drawn: Sequence[list[Row]]
) -> Iterator[Chart]:
    name = conversion.name
    if isinstance(conversion, LatentConversion):
        rows, draw = latent_rows(conversion), partial(plots.latent_energy, conversion)
        yield Chart("lost-energy", name, _latent_words(name, rows), rows, draw)
    else:
        rows, merged = lost_energy_rows(conversion), partial(plots.lost_energy, conversion)
        yield Chart("lost-energy", name, _merged_words(name, rows), rows, merged)
    similar = similarity_rows(conversion)
    if similar and similar not in drawn:
        framed = partial(plots.similarity, conversion)
        yield Chart("similarity", name, _similarity_words(similar), similar, framed)


def _pareto_words(rows: Sequence[Row]) -> str:
    best = [
        f"{row['model']} with {format_bytes(row['kv_bytes_per_token'])} and KL {row['kl']:.4g} "
        f"on {row['text']}"
        for row in rows
        if row["front"] and row["role"] == "conversion"
    ]
    return (
        "KV cache per token against KL to the source. Conversions that no other one beats in both: "
        f"{'; '.join(best) or 'none'}."
    )


def _training_words(rows: Sequence[Row]) -> str:
    """First and last loss of each run, by the best measure that it has."""
    told = []
    for name in dict.fromkeys(row["run"] for row in rows):
        points = [row for row in rows if row["run"] == name]
        for key in ("held_out_kl", "held_out_ce", "kl", "ce"):
            found = [(row["tokens"], row[key]) for row in points if row[key]]
            if found:
                (start, first), (end, last) = found[0], found[-1]
                measure = key.replace("_", " ").replace("kl", "KL").replace("ce", "cross entropy")
                told.append(f"{name}: {measure} {first:.4g} at {start:,} and {last:.4g} at {end:,}")
                break
    return f"Losses against tokens, in nats per token. {'; '.join(told)}."


def _merged_words(name: str, rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: max(row["lost_k"], row["lost_v"]))
    keys, values = (100 * fmean(row[f"lost_{part}"] for row in rows) for part in ("k", "v"))
    return (
        f"Energy that {name} lost in each layer and head: {keys:.1f} % of keys and {values:.1f} % "
        f"of values in the mean, most in head {worst['head']} of layer {worst['layer']}."
    )


def _latent_words(name: str, rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: row["lost_rope"] + row["lost_latent"])
    rope, latent = (100 * fmean(row[f"lost_{part}"] for row in rows) for part in ("rope", "latent"))
    return (
        f"Energy that {name} lost in each layer: {rope:.1f} % with the rotation and {latent:.1f} % "
        f"in the latent in the mean, most in layer {worst['layer']}."
    )


def _similarity_words(rows: Sequence[Row]) -> str:
    least = min(rows, key=lambda row: row["similarity"])
    return (
        "Similarity of the attention inputs of each two layers of the source, least "
        f"({100 * least['similarity']:.0f} %) between layers {least['owner']} and "
        f"{least['layer']}."
    )
