"""Training curves in a report, read off matplotlib's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convert.reporting.conversions import read_conversions
from convert.reporting.figures import render
from convert.reporting.rows import Row, training_rows
from convert.reporting.runs import runs_of
from convert.reporting.training import training_curve, training_runs
from tests.manifests import manifest, training, write


def rows_of(folder: Path, trainings: dict[str, list[dict[str, Any]]]) -> list[Row]:
    folders = [
        write(folder / name, manifest(1000, None, trainings=runs))
        for name, runs in trainings.items()
    ]
    return training_rows(runs_of(read_conversions(folders)))


def shown(figure: Figure) -> dict[str, list[list[list[float]]]]:
    """Points of the lines in each panel that is drawn, by its title."""
    return {
        axes.get_title(): [line.get_xydata().tolist() for line in axes.lines]
        for axes in figure.axes
        if axes.axison
    }


def test_several_runs_share_a_plot(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path,
        {"mean": [training(400, [0.8, 0.5, 0.3])], "svd": [training(200, [0.4, 0.1])]},
    )
    figure = training_runs(rows)
    where = "\nheld.txt, up to 8 sequences of 64 tokens"
    assert shown(figure) == {
        f"KL to the teacher{where}": [
            [[0, 0.8], [200, 0.5], [400, 0.3]],
            [[0, 0.4], [200, 0.1]],
        ],
        f"cross entropy{where}": [
            [[0, 2.8], [200, 2.5], [400, 2.3]],
            [[0, 2.4], [200, 2.1]],
        ],
    }
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    (legend,) = figure.legends
    assert [label.get_text() for label in legend.get_texts()] == ["mean", "svd"]
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert len(set(looks)) == 2
    assert looks == [(line.get_color(), line.get_marker()) for line in figure.axes[1].lines]


def test_a_run_that_went_on_is_told_once_and_begins_where_the_first_ended(tmp_path: Path) -> None:
    first, second = training(400, [0.8, 0.3]), training(200, [0.3, 0.2])
    rows = rows_of(tmp_path, {"again": [first, second], "base": [first]})
    points = [(row["run"], row["tokens"], row["held_out_kl"]) for row in rows]
    assert points == [
        ("base", 0, 0.8),
        ("base", 400, 0.3),
        ("again", 400, 0.3),
        ("again", 600, 0.2),
    ]
    alone = rows_of(tmp_path / "alone", {"again": [first, second]})
    assert list(dict.fromkeys(row["run"] for row in alone)) == ["again, run 1", "again"]


def test_runs_without_a_held_out_text_show_their_training_loss_apart(tmp_path: Path) -> None:
    blind = training(400, [0.8, 0.5, 0.3], eval_text=None)
    blind["curve"] = [
        {key: value for key, value in point.items() if not key.startswith("eval")}
        for point in blind["curve"]
    ]
    rows = rows_of(tmp_path, {"blind": [blind], "seen": [training(400, [0.4, 0.1])]})
    panels = shown(training_runs(rows))
    # without a point before training, and without cross entropy, which was not asked for
    assert panels.pop("KL to the teacher\nwhile training on train.txt") == [
        [[200, 1.0], [400, 0.6]]
    ]
    assert [title.split("\n")[1].split(",")[0] for title in panels] == ["held.txt"] * 2


@pytest.mark.parametrize("losses", [[0.9, 0.5], [3.0, 0.0002]])
@pytest.mark.parametrize("kind", ["one", "several"])
def test_ticks_are_plain_numbers(kind: str, losses: list[float], tmp_path: Path) -> None:
    run = training(300_000, losses)
    rows = rows_of(tmp_path, {"run": [run]})
    kept: list[Figure] = []

    def draw() -> Figure:
        kept.append(training_curve(run) if kind == "one" else training_runs(rows))
        return kept[0]

    render(draw)
    FigureCanvasAgg(kept[0]).draw()
    axes = kept[0].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels(which="both")]
    low, high = axes.get_ylim()
    inside = [label for label in labels if label and low <= float(label) <= high]
    assert len(inside) >= 2
    assert "300,000" in [label.get_text() for label in axes.get_xticklabels()]
