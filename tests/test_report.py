"""Reports of hand-written manifests: rows, files and refusals."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from convert.cli import app
from convert.reporting.conversions import read_conversions
from convert.reporting.rows import pareto_front, pareto_rows
from tests.manifests import HEADS, LAYERS, SIMILARITY, SOURCE, evaluation, layer, manifest, write

ROOT = Path(__file__).parents[1]


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A grouped model, and one with shared layers that was calibrated."""
    return [
        write(tmp_path / "gqa", manifest(1000, 0.5)),
        write(tmp_path / "cla", manifest(2400, 0.1, shared=True)),
    ]


def test_every_plot_comes_as_png_svg_and_csv(two: list[Path], tmp_path: Path) -> None:
    to = tmp_path / "new" / "report"
    result = report(*two, "--to", to)
    assert result.exit_code == 0, result.stderr
    names = ["pareto", "lost-energy-gqa", "lost-energy-cla", "similarity-cla"]
    expected = [to / f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "csv")]
    assert result.stdout.splitlines() == list(map(str, expected))
    assert sorted(to.iterdir()) == sorted(expected)
    for path in expected:
        start = {".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".csv": b""}[path.suffix]
        assert path.read_bytes().startswith(start)
        assert path.stat().st_size > 100
    assert result.stderr == ""


def test_json_holds_the_rows_that_the_csv_files_hold(two: list[Path], tmp_path: Path) -> None:
    result = report(*two, "--to", tmp_path / "report", "--json")
    data = json.loads(result.stdout)
    tables = [Path(file) for file in data["files"] if file.endswith(".csv")]
    assert [table.stem for table in tables] == list(data["rows"])
    for table in tables:
        with table.open(newline="") as stream:
            written = list(csv.DictReader(stream))
        texts = [
            {key: "" if value is None else str(value) for key, value in row.items()}
            for row in data["rows"][table.stem]
        ]
        assert written == texts


def test_rows_are_the_numbers_of_the_manifests(two: list[Path], tmp_path: Path) -> None:
    data = json.loads(report(*two, "--to", tmp_path / "report", "--json").stdout)["rows"]
    sizes = [(r["model"], r["role"], r["kv_bytes_per_token"], r["kl"]) for r in data["pareto"]]
    assert sizes == [
        ("org/small", "source", 4000, 0.0),
        ("gqa", "conversion", 1000, 0.5),
        ("cla", "conversion", 2400, 0.1),
    ]
    assert [row["perplexity"] for row in data["pareto"]] == [5.0, 7.5, 7.5]
    lost = data["lost-energy-cla"]
    assert len(lost) == LAYERS * HEADS
    assert lost[2 * HEADS + 3] == {
        "layer": 2,
        "source": 1,
        "head": 3,
        "lost_k": 0.02 + 0.006,
        "lost_v": 0.1 + 0.02 + 0.006,
        "layer_lost_k": 0.02,
        "layer_lost_v": 0.1 + 0.02,
        "layer_attention_kl": 0.6,
        "layer_output_error": 0.1,
    }
    assert {row["layer_attention_kl"] for row in data["lost-energy-gqa"]} == {None}
    similar = data["similarity-cla"]
    assert {(r["owner"], r["layer"]): r["similarity"] for r in similar} == {
        (i, j): SIMILARITY[i][j] for i in range(LAYERS) for j in range(LAYERS)
    }
    assert [(r["owner"], r["layer"]) for r in similar if r["shared"]] == [(1, 2), (3, 4)]


coordinates = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=12))
def test_the_front_is_what_a_sweep_from_the_left_finds(points: list[tuple[float, float]]) -> None:
    best, lowest = set(), float("inf")
    for cost, loss in sorted(points):
        if loss < lowest:
            lowest = loss
            best.add((cost, loss))
    assert pareto_front(points) == [point in best for point in points]


def test_only_equal_settings_are_compared(tmp_path: Path) -> None:
    """What is measured on another text, or on more windows, neither beats nor is beaten."""
    easy = [evaluation(0.01, "easy.txt"), evaluation(0.4)]
    longer = [evaluation(0.02, windows=16), evaluation(None)]
    folders = [
        write(tmp_path / "a", manifest(1000, evaluations=easy)),
        write(tmp_path / "b", manifest(1000, evaluations=longer)),
        write(tmp_path / "c", manifest(1000, 0.5)),
    ]
    rows = pareto_rows(read_conversions(folders))
    front = [(row["model"], row["text"], row["windows"], row["kl"]) for row in rows if row["front"]]
    assert front == [
        ("org/small", "easy.txt", 8, 0.0),
        ("a", "easy.txt", 8, 0.01),
        ("org/small", "valid.txt", 8, 0.0),
        ("a", "valid.txt", 8, 0.4),
        ("org/small", "valid.txt", 16, 0.0),
        ("b", "valid.txt", 16, 0.02),
    ]
    assert [row["model"] for row in rows if not row["front"]] == ["c"]


def test_bytes_depend_on_the_manifests_alone(two: list[Path], tmp_path: Path) -> None:
    """Not on matplotlib's settings, hash seeds, the date or the folder."""
    first = tmp_path / "first"
    with mpl.rc_context({"font.size": 20, "svg.hashsalt": "other", "axes.grid": True}):
        assert report(*two, "--to", first, "--html", first / "all.html").exit_code == 0
    again = tmp_path / "elsewhere" / "second"
    arguments = ["report", *map(str, two), "--to", str(again), "--html", str(again / "all.html")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run(
        [sys.executable, "-m", "convert", *arguments], check=True, cwd=ROOT, env=environment
    )
    assert (first / "all.html").is_file()
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_an_output_without_evaluation_is_named_and_left_out(
    two: list[Path], tmp_path: Path
) -> None:
    bare = write(tmp_path / "bare", manifest(500, None))
    alone = write(tmp_path / "alone", manifest(500, evaluations=[evaluation(None)]))
    result = report(*two, bare, alone, "--to", tmp_path / "report", "--json")
    assert result.exit_code == 0
    warnings = result.stderr.splitlines()
    assert [line.split()[:2] for line in warnings] == [["warning:", "bare"], ["warning:", "alone"]]
    rows = json.loads(result.stdout)["rows"]
    assert {row["model"] for row in rows["pareto"]} == {"org/small", "gqa", "cla"}
    assert "lost-energy-bare" in rows
    assert report(*two, bare, "--to", tmp_path / "quiet", "-q").stderr == ""


def test_nothing_evaluated_says_how_to_evaluate(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare", manifest(500, None))
    result = report(bare, "--to", tmp_path / "report")
    assert result.exit_code == 2
    assert "kvpatch eval OUT --text FILE --against SOURCE --save" in result.stderr
    assert not (tmp_path / "report").exists()


def test_other_sources_are_refused(two: list[Path], tmp_path: Path) -> None:
    other = manifest()
    files = {"model.safetensors": {"sha256": "6b" * 32}}
    other["source"] = SOURCE | {"name": "org/big", "files": files}
    result = report(*two, write(tmp_path / "other", other), "--to", tmp_path / "report")
    assert result.exit_code == 2
    assert "different sources (org/small and org/big" in result.stderr
    assert not (tmp_path / "report").exists()


def test_a_folder_without_manifest_is_refused(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        result = report(*two, tmp_path / name, "--to", tmp_path / "report")
        assert result.exit_code == 3
        assert f"{name} has no kvpatch.json" in result.stderr


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"layers": []}, "layers are not numbered from 0"),
        ({"layers": [layer(1, 1, measured=False)]}, "layers are not numbered from 0"),
        ({"layers": [layer(0, 7, measured=False)]}, "a layer that is not there"),
        ({"layers": [layer(0, 0, measured=False) | {"lost_heads_k": [0.1]}]}, "numbers of heads"),
        ({"layers": [{"layer": 0, "source": 0}]}, "layers.0.lost_energy_k: Field required"),
        ({"similarity": [[1.0]]}, "similarity is no 5 x 5 matrix"),
        ({"evaluations": [evaluation(float("nan"))]}, "evaluations.0.against.kl"),
        ({"kv_cache": {"kv_heads": [4, 2], "bytes_per_token": [4000]}}, "does not hold two sizes"),
    ],
)
def test_damaged_manifests_are_refused(changed: dict[str, Any], where: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "out", manifest(**changed))
    result = report(folder, "--to", tmp_path / "report")
    assert result.exit_code == 3, result.stderr
    assert where in result.stderr
    assert "kvpatch.json" in result.stderr
    assert not (tmp_path / "report").exists()


def test_layers_measured_in_part_are_refused(tmp_path: Path) -> None:
    content = manifest(shared=True)
    del content["layers"][3]["attention_kl"]
    result = report(write(tmp_path / "out", content), "--to", tmp_path / "report")
    assert result.exit_code == 3
    assert "attention_kl stands in some layers only" in result.stderr


def test_a_folder_that_exists_is_replaced_only_on_request(two: list[Path], tmp_path: Path) -> None:
    to = tmp_path / "report"
    to.mkdir()
    (to / "notes.md").write_text("mine")
    (to / "pareto.csv").write_text("old")
    refused = report(*two, "--to", to)
    assert refused.exit_code == 7
    assert "--overwrite" in refused.stderr
    assert {path.name: path.read_text() for path in to.iterdir()} == {
        "notes.md": "mine",
        "pareto.csv": "old",
    }
    assert report(*two, "--to", to, "--overwrite").exit_code == 0
    assert (to / "notes.md").read_text() == "mine"
    assert (to / "pareto.csv").read_text().startswith("model,role,")


def test_a_file_is_never_replaced(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    assert report(*two, "--to", tmp_path / "report", "--overwrite").exit_code == 7
    assert (tmp_path / "report").read_text() == "mine"


def test_names_that_would_meet_are_told_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / parent / "gqa", manifest()) for parent in ("a", "b")]
    assert [c.name for c in read_conversions(folders)] == ["a-gqa", "b-gqa"]
    twice = report(folders[0], tmp_path / "b" / ".." / "a" / "gqa", "--to", tmp_path / "report")
    assert twice.exit_code == 2
    assert "named twice" in twice.stderr
    # joined, two of these paths read alike at every length at which all three differ
    alike = [write(tmp_path / end, manifest()) for end in ("x-y/c", "x/y-c", "z/c")]
    result = report(*alike, "--to", tmp_path / "report")
    assert result.exit_code == 2
    assert "cannot be told apart" in result.stderr


def test_dollars_and_underscores_in_names_are_shown_as_they_are(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a$x^{2$_b", manifest()),
        write(tmp_path / "_hidden", manifest(500)),
    ]
    to = tmp_path / "report"
    assert report(*folders, "--to", to).exit_code == 0
    svg = (to / "pareto.svg").read_text()
    assert "<!-- a$x^{2$_b -->" in svg
    assert "<!-- _hidden -->" in svg


def test_manifests_of_real_conversions_are_read(demo_model: Path, tmp_path: Path) -> None:
    for name, words in (("train", "Petra has the brown hat. "), ("valid", "Oren leaves. ")):
        (tmp_path / f"{name}.txt").write_text(words * 60)
    flags = ["--merge", "svd", "--calibration", tmp_path / "train.txt", "--context", "32"]
    commands = [
        ["gqa", demo_model, tmp_path / "gqa", "--kv-heads", "2", "-q"],
        ["cla", demo_model, tmp_path / "cla", "--share", "2", *flags, "--samples", "2", "-q"],
    ]
    for command in commands:
        made = CliRunner().invoke(app, [str(word) for word in command])
        assert made.exit_code == 0, made.stderr
    text = ["--text", tmp_path / "valid.txt", "--context", "32", "--samples", "2"]
    measure = ["eval", tmp_path / "gqa", *text, "--against", demo_model, "--save", "--json", "-q"]
    measured = CliRunner().invoke(app, [str(word) for word in measure])
    assert measured.exit_code == 0, measured.stderr
    result = report(tmp_path / "gqa", tmp_path / "cla", "--to", tmp_path / "report", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["model"] for row in rows["pareto"]] == [demo_model.name, "gqa"]
    assert rows["pareto"][1]["kl"] == json.loads(measured.stdout)["against"]["kl"]
    assert all(row["layer_attention_kl"] >= 0 for row in rows["lost-energy-cla"])
