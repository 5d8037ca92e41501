"""What the plots of a report show, read off matplotlib's figures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from convert.reporting import figures, plots
from convert.reporting.conversions import Conversion, read_conversions
from convert.reporting.rows import pareto_rows
from tests.manifests import HEADS, SIMILARITY, evaluation, layer, manifest, write


def _conversion(folder: Path, content: dict[str, Any]) -> Conversion:
    return read_conversions([write(folder, content)])[0]


def test_the_pareto_plot_shows_every_point(tmp_path: Path) -> None:
    two = [
        write(tmp_path / "gqa", manifest(1000, 0.5)),
        write(tmp_path / "cla", manifest(2400, 0.1)),
    ]
    (axes,) = plots.pareto(pareto_rows(read_conversions(two))).axes
    shown = {line.get_label(): line.get_xydata().ravel().tolist() for line in axes.lines}
    assert shown == {
        "Pareto front": [1000.0, 0.5, 2400.0, 0.1, 4000.0, 0.0],
        "org/small (source)": [4000.0, 0.0],
        "gqa": [1000.0, 0.5],
        "cla": [2400.0, 0.1],
    }
    looks = [(line.get_marker(), line.get_color()) for line in axes.lines]
    assert len(set(looks)) == len(looks)
    low, high = axes.get_ylim()
    assert low == 0 < 0.5 < high


def test_each_text_has_a_panel_and_a_front_of_its_own(tmp_path: Path) -> None:
    measured = [evaluation(0.3), evaluation(0.02, "easy.txt")]
    folder = write(tmp_path / "gqa", manifest(1000, evaluations=measured))
    panels = plots.pareto(pareto_rows(read_conversions([folder]))).axes
    fronts = {
        panel.get_title().splitlines()[0]: line.get_ydata()
        for panel in panels
        for line in panel.lines
        if line.get_label() == "Pareto front"
    }
    assert {text: list(front) for text, front in fronts.items()} == {
        "valid.txt": [0.3, 0.0],
        "easy.txt": [0.02, 0.0],
    }


def test_the_map_shows_every_head_and_the_lines_every_layer(tmp_path: Path) -> None:
    content = manifest(shared=True)
    content["layers"][4]["lost_heads_v"][0] = 1.05  # a bad average loses more than there was
    figure = plots.lost_energy(_conversion(tmp_path / "cla", content))
    keys, values, *lines = figure.axes
    for axes, name in ((keys, "lost_heads_k"), (values, "lost_heads_v")):
        shown = np.asarray(axes.images[0].get_array())
        assert shown.tolist() == [layer[name] for layer in content["layers"]]
    drawn = {axes.get_title(): axes.lines[0] for axes in lines if axes.lines}
    wanted = {
        "predicted:\nlost key energy": [0, 1, 2, 3, 4],
        "measured:\nattention KL": [0, 0.3, 0.6, 0.9, 1.2],
        "predicted:\nlost value energy": [10, 11, 12, 13, 14],
        "measured:\noutput error": [0, 5, 10, 15, 20],
    }
    assert list(drawn) == list(wanted)
    for title, line in drawn.items():
        assert np.asarray(line.get_ydata()).tolist() == [0, 1, 2, 3, 4]
        assert np.asarray(line.get_xdata()) == pytest.approx(wanted[title])
    labels = [label.get_text() for label in keys.get_yticklabels()]
    assert labels == ["0", "1", "1 → 2", "3", "3 → 4"]
    assert [text.get_text() for text in keys.texts[:HEADS]] == ["0.0", "0.2", "0.4", "0.6"]
    assert [text.get_text() for text in values.texts[-HEADS:]] == ["105", "14", "14", "15"]


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    figure = plots.lost_energy(_conversion(tmp_path / "gqa", manifest()))
    titles = [axes.get_title() for axes in figure.axes if axes.lines]
    assert titles == ["predicted:\nlost key energy", "predicted:\nlost value energy"]


def test_layers_that_share_are_framed(tmp_path: Path) -> None:
    axes, _ = plots.similarity(_conversion(tmp_path / "cla", manifest(shared=True))).axes
    assert np.asarray(axes.images[0].get_array()).tolist() == SIMILARITY
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [(f.get_y() + 0.5, f.get_x() + 0.5) for f in frames] == [(1, 2), (3, 4)]  # row, column


def _large(folder: Path) -> Figure:
    """160 layers of 64 heads."""
    layers = [layer(i, i - i % 2, heads=64, measured=True) for i in range(160)]
    return plots.lost_energy(_conversion(folder / "large", manifest(layers=layers)))


def _crowded(folder: Path) -> Figure:
    """Caches of a source with 256 heads, and long names."""
    full = 10_485_760
    sizes = [full // 2**power for power in range(1, 9)]
    folders = [
        write(folder / f"a-model-with-a-rather-long-name-{size}", manifest(size, 0.3))
        for size in sizes
    ]
    for path in folders:
        content = json.loads((path / "kvpatch.json").read_text())
        content["kv_cache"]["bytes_per_token"][0] = full
        content["evaluations"].append(evaluation(2.0, "another-text.txt"))
        (path / "kvpatch.json").write_text(json.dumps(content))
    return plots.pareto(pareto_rows(read_conversions(folders)))


def _narrow(folder: Path) -> Figure:
    """Few layers, and a long name."""
    content = manifest(shared=True)
    return plots.similarity(
        _conversion(folder / "a-model-with-a-rather-long-name-of-its-own", content)
    )


@pytest.mark.parametrize("draw", [_large, _crowded, _narrow])
def test_labels_do_not_overlap(draw: Any, tmp_path: Path) -> None:
    figure = draw(tmp_path)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axes in figure.axes:
        groups = [axes.get_xticklabels(), axes.get_yticklabels()]
        for labels in groups:
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_text()]
            for one, other in itertools.combinations(boxes, 2):
                assert not one.overlaps(other), [label.get_text() for label in labels]
    titles = [axes.title for axes in figure.axes] + [
        text for text in figure.texts if text.get_text()
    ]
    shown = [title.get_window_extent(renderer) for title in titles if title.get_text()]
    for one, other in itertools.combinations(shown, 2):
        assert not one.overlaps(other)
    edge = figure.bbox
    assert all(edge.x0 <= box.x0 and box.x1 <= edge.x1 for box in shown)
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert edge.y0 <= box.y0
        assert box.y1 <= edge.y1
        assert not any(box.overlaps(axes.get_tightbbox(renderer)) for axes in figure.axes)


_NAMES = {
    "模型": r"\u6a21\u578b",
    "модель-é": "модель-é",
    "ملف": "ملف",
    "🙂": r"\U0001f642",
    "千問-2.5-七十二億-指令-長文脈-量子化": r"\u5343\u554f-2.5-…\u5b50\u5316",
    "a" * 40: "a" * 17 + "…" + "a" * 17,
}


@pytest.mark.parametrize("name", _NAMES)
def test_names_in_any_script_are_drawn(tmp_path: Path, name: str) -> None:
    """Every glyph is there, else matplotlib warns, and warnings are errors here."""
    folder = write(tmp_path / name, manifest(shared=True, evaluations=[evaluation(0.5, name)]))
    conversion = read_conversions([folder])[0]
    pictures = {
        "pareto": lambda: plots.pareto(pareto_rows([conversion])),
        "lost": lambda: plots.lost_energy(conversion),
        "similar": lambda: plots.similarity(conversion),
    }
    for draw in pictures.values():
        assert figures.render(draw).keys() == {"png", "svg"}
    (panel,) = pictures["pareto"]().axes
    assert panel.get_title().splitlines()[0] == _NAMES[name]
    assert _NAMES[name] in {line.get_label() for line in panel.lines}
