"""The HTML page of a report: what stands in it, that names cannot change it, and its refusals."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from convert.cli import app
from tests.manifests import (
    SOURCE,
    evaluation,
    latent_manifest,
    manifest,
    probe,
    task,
    training,
    write,
)

NONE = "\u2013"
_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """A page, read by another parser than a browser's: elements, texts and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words = ""
        self._open: list[str] = []
        self._cells: list[str] | None = None
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in {"th", "td"}:
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self.words += data
        if "caption" in self._open:
            self._caption += data
        elif {"th", "td"} & set(self._open[-1:]):
            self._rows[-1][-1] += data

    def table(self, start: str) -> list[list[str]]:
        (found,) = (rows for caption, rows in self.tables.items() if caption.startswith(start))
        return found


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def project(folder: Path, name: str = "gqa", words: str = "") -> Path:
    """Every kind of result, at different depths; ``words`` stand in every text that is free.

    Args:
        folder: To make.
        name: Of one conversion.
        words: Appended to names of models, texts, packages and keys.
    """
    source = SOURCE | {"name": "org/small" + words, "repository": "org/small" + words}
    common = {
        "source": source,
        "architecture": "LlamaForCausalLM" + words,
        "versions": {"kvpatch": "0.1.0", "torch" + words: "2.13.0" + words},
    }
    first = training(
        1000,
        [0.8, 0.4, 0.2],
        data={"name": "train.txt" + words, "sha256": None},
        teacher="org/small" + words,
    )
    pooled = {
        "recipe": {"method": "gqa", "merge": "mean", "refit": "none", "x" + words: words},
        "evaluations": [evaluation(0.5, "valid.txt" + words)],
        "tasks": [task("arc_easy" + words)],
    }
    shared = {
        "evaluations": [evaluation(0.1, "valid.txt" + words)],
        "retrieval": [probe(text="built-in text" + words)],
    }
    latent = {"evaluations": [evaluation(0.2, "valid.txt" + words)]}
    write(folder / name, manifest(1000) | common | pooled)
    write(folder / "cla", manifest(2400, shared=True) | common | shared)
    write(folder / "mla", latent_manifest(500) | common | latent)
    write(folder / "new/cla", manifest(2400, None, shared=True, trainings=[first]) | common)
    again = [first, training(600, [0.2, 0.1])]
    write(folder / "new/again", manifest(2400, None, shared=True, trainings=again) | common)
    write(folder / ".mla.partial-0", latent_manifest())
    exported = {"recipe": {"method": "export"}}
    write(folder / "exported", manifest() | exported)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    result = report(project(folder / "project"), "--html", folder / "new" / "report.html")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(folder / "new" / "report.html")]
    warned = [line for line in result.stderr.splitlines() if "exported" in line]
    assert len(warned) == 1
    assert "was exported" in warned[0]
    return (folder / "new" / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_table_has_the_source_and_every_conversion(page: Page) -> None:
    columns, *rows = page.table("Source and conversions")
    assert columns[:4] == ["model", "method", "KV cache per token", "of the source's"]
    assert rows == [
        ["org/small", "the source", "4.00 kB", "100 %", NONE, "0.0000", "5.000", "100.0 %", "yes"],
        [
            "cla",
            "CLA2 with 2 KV heads, merge svd, calibrated",
            *("2.40 kB", "60.0 %", NONE, "0.1000", "7.500", "75.0 %", "yes"),
        ],
        [
            "gqa",
            "GQA with 2 KV heads, merge mean",
            *("1.00 kB", "25.0 %", NONE, "0.5000", "7.500", "75.0 %", "no"),
        ],
        [
            "mla",
            "MLA 12+4, refit qo",
            *("500 B", "12.5 %", NONE, "0.2000", "7.500", "75.0 %", "yes"),
        ],
        [
            "new-again",
            "CLA2 with 2 KV heads, merge svd, calibrated",
            *("2.40 kB", "60.0 %", "1,600", *[NONE] * 4),
        ],
        [
            "new-cla",
            "CLA2 with 2 KV heads, merge svd, calibrated",
            *("2.40 kB", "60.0 %", "1,000", *[NONE] * 4),
        ],
    ]


def test_runs_measurements_and_versions_stand_in_the_page(page: Page) -> None:
    texts = ["train.txt", "org/small", "held.txt", "all"]
    assert page.table("Uptraining runs")[1:] == [
        ["new-cla", *texts, "1,000", "10", "0.8000 → 0.2000", "2.8000 → 2.2000"],
        ["new-again", *texts, "600", "6", "0.2000 → 0.1000", "2.2000 → 2.1000"],
    ]
    setting = "valid.txt: 8 windows of 128 tokens, stride 128, float32"
    assert [row[:2] for row in page.table("Perplexity")[1:]] == [
        [name, setting] for name in ("cla", "gqa", "mla")
    ]
    assert page.table("keys found")[1] == ["50 %", "75 % (100 %)", "75 % (100 %)"]
    assert page.table("tasks of")[1][4:] == ["0.5125 ± 0.0100", "0.5450", "-0.0325 ± 0.0200"]
    for words in (
        "kvpatch 0.1.0, torch 2.13.0",
        "c0ffee",
        f"sha256 {'5a' * 32}",
        "sha256 7c",
        "method: mla",
    ):
        assert words in page.words


def test_the_page_needs_nothing_else_and_tells_what_its_pictures_show(
    page: Page, text: str
) -> None:
    assert "http:" not in text.replace("http://www.w3.org/1999/xlink", "")
    assert "https:" not in text
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "img", "foreignobject"}
    assert not [key for _, found in page.elements for key in found if key.startswith("on")]
    pictures = [found for tag, found in page.elements if tag == "svg"]
    # cache and KL, training, three conversions that lost something, two of which were calibrated
    assert len(pictures) == 6
    alts = [found["aria-label"] or "" for found in pictures]
    assert len(set(alts)) == len(alts)
    assert {found["role"] for found in pictures} == {"img"}
    assert alts[0].endswith(
        "beats in both: cla with 2.40 kB and KL 0.1 on valid.txt; mla with 500 B and KL 0.2 on "
        "valid.txt."
    )
    assert "new-cla: held out KL 0.8 at 0 and 0.2 at 1,000" in alts[1]
    assert "new-again: held out KL 0.2 at 1,000 and 0.1 at 1,600" in alts[1]
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(set(ids)) == len(ids)
    links = [found["href"] or "" for _, found in page.elements if "href" in found]
    assert links
    assert {link[1:] for link in links if not link.startswith("data:image/png;")} <= set(ids)
    heads = [found.get("scope") for tag, found in page.elements if tag == "th"]
    assert set(heads) == {"col", "row"}
    assert len(page.tables) == sum(tag == "table" for tag, _ in page.elements)  # all have captions


def test_plots_take_the_colours_of_the_page(text: str) -> None:
    for colour in ("#010203", "#020304", "#0072b2;", "#d55e00;"):
        assert f": {colour}" not in text.partition("</style>")[2]
    assert "fill: var(--ink)" in text
    assert "stroke: var(--series-0)" in text


HOSTILE = (
    "</title></caption><script>alert(1)</script>\"'><img src=x onerror=alert(1)>",
    "--><svg onload=alert(1)></style>]]>{{ 7 * 7 }}{% raw %}&lt;b&gt;&amp;\x1b[31m\u202e",
)


@pytest.mark.parametrize("words", HOSTILE)
def test_names_cannot_change_the_page(words: str, page: Page, tmp_path: Path) -> None:
    """A page of hostile names has the elements and attributes of a harmless one."""
    name = f"gqa{words}".replace("/", "\u2215")
    file = tmp_path / "report.html"
    result = report(project(tmp_path / "project", name, words), "--html", file, "-q")
    assert result.exit_code == 0, result.stderr
    hostile = Page(file.read_text())
    assert _skeleton(hostile) == _skeleton(page)
    assert hostile.table("Source and conversions")[1][0].startswith("org/small")
    spelled = words.replace("\x1b", "\\x1b").replace("\u202e", "\\x202e")
    assert f"train.txt{spelled}" in hostile.words


def _skeleton(page: Page) -> list[tuple[str, list[str]]]:
    """Elements and names of attributes, but for the glyphs of a plot, which spell names."""
    glyphs = {"g", "use", "path", "defs"}
    assert all(
        set(found) <= {"id", "style", "transform", "d", "clip-path", "href", "x", "y"}
        for tag, found in page.elements
        if tag in glyphs
    )
    return [(tag, sorted(found)) for tag, found in page.elements if tag not in glyphs]


def test_conversions_of_two_sources_have_sections_of_their_own(tmp_path: Path) -> None:
    files = {"model.safetensors": {"sha256": "6b" * 32}}
    other = manifest(500, 0.3, source=SOURCE | {"name": "org/big", "files": files})
    folder = tmp_path / "project"
    write(folder / "one", manifest())
    write(folder / "two", other)
    result = report(folder, "--html", tmp_path / "report.html", "--json")
    assert result.exit_code == 0, result.stderr
    assert list(json.loads(result.stdout)["rows"]) == [
        "pareto",
        "lost-energy-one",
        "pareto-2",
        "lost-energy-two",
    ]
    page = Page((tmp_path / "report.html").read_text())
    labels = [found["aria-label"] for tag, found in page.elements if tag == "section"]
    assert labels == ["org/small", "org/big"]
    refused = report(folder, "--to", tmp_path / "plots", "--html", tmp_path / "second.html")
    assert refused.exit_code == 2
    assert "different sources" in refused.stderr
    assert not (tmp_path / "second.html").exists()


def test_without_any_measurement_the_page_says_how_to_measure(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    result = report(write(tmp_path / "gqa", manifest(500, None)), "--html", file)
    assert result.exit_code == 0, result.stderr
    assert "gqa has no saved evaluation" in result.stderr
    words = Page(file.read_text()).words
    assert "kvpatch eval OUT --text FILE --against SOURCE --save" in words
    assert "Nothing was measured yet." in words


def test_a_page_is_replaced_only_on_request(tmp_path: Path) -> None:
    folder = write(tmp_path / "gqa", manifest())
    file = tmp_path / "report.html"
    file.write_text("mine")
    assert report(folder, "--html", file).exit_code == 7
    assert file.read_text() == "mine"
    assert report(folder, "--html", file, "--overwrite").exit_code == 0
    assert file.read_text().startswith("<!DOCTYPE html>")
    refused = report(folder, "--html", tmp_path, "--overwrite")
    assert refused.exit_code == 7
    assert "is a folder" in refused.stderr


def test_a_report_of_nothing_to_nowhere_is_refused(tmp_path: Path) -> None:
    nowhere = report(write(tmp_path / "gqa", manifest()))
    assert nowhere.exit_code == 2
    assert "--html FILE" in nowhere.stderr
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    nothing = report(tmp_path / "empty", "--html", tmp_path / "report.html")
    assert nothing.exit_code == 3
    assert "empty has no kvpatch.json, and no folder in it has" in nothing.stderr


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"trainings": [training(100, [0.5, 0.4]) | {"curve": []}]}, "trainings.0.curve"),
        ({"retrieval": [probe(lengths=[128])]}, "cells are not those of lengths and depths"),
        ({"retrieval": [probe(exact={"value": 1.0, "error": None})]}, "compared with the source"),
        ({"tasks": [task() | {"metrics": [{"name": "acc"}]}]}, "tasks.0.metrics.0"),
        ({"versions": None}, "versions"),
        ({"recipe": {"method": "cla", "merge": "svd", "refit": "none"}}, "how many layers share"),
    ],
)
def test_damaged_manifests_are_refused(changed: dict[str, Any], where: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "out", manifest(**changed))
    result = report(folder, "--html", tmp_path / "report.html")
    assert result.exit_code == 3, result.stderr
    assert where in result.stderr
    assert "kvpatch.json" in result.stderr
    assert not (tmp_path / "report.html").exists()
