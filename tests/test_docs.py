"""What the documentation shows is what happens: commands, messages, numbers, links, the API."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvpatch.errors
from convert.targets import serving
from tests.documents import DOCS, PAGES, ROOT, blocks, commands, prose, spans
from tests.faults.running import cli
from tests.flags import COMMANDS, flags_of
from tests.messages import texts

_SHELL = {"console", "bash", "sh"}
# flags of other programs that the pages name
_OF_OTHERS = {"--config_file"}


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _called(words: list[str]) -> list[str]:
    """Arguments of kvpatch in a command; none if it runs something else."""
    if words[:1] == ["kvpatch"]:
        return words[1:]
    module = words.index("-m") + 1 if "-m" in words else 0
    return words[module + 1 :] if module and words[module] == "convert" else []


def _all_commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page):
            for words in commands(block) if block.language in _SHELL else ():
                if called := _called(words):
                    yield _name(page), called


@pytest.mark.parametrize(("page", "words"), list(_all_commands()), ids=str)
def test_commands_are_understood(page: str, words: list[str]) -> None:
    """Every flag exists, has a value of its type, and none is missing."""
    COMMANDS[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_in_prose_exist(page: Path) -> None:
    for span in spans(page):
        words = span.split()
        flags = {re.sub(r"=.*|[.,;:]$", "", word) for word in words if word.startswith("--")}
        if words[:1] == ["kvpatch"] and len(words) > 1:
            assert words[1] in COMMANDS, span
            assert flags <= flags_of(words[1]), span
        elif not words[0].startswith(("accelerate", "pip", "hf", "python")):
            assert flags <= set.union(*map(flags_of, COMMANDS)) | _OF_OTHERS, span


_RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.parametrize("page", _RUNNING, ids=_name)
def test_blocks_that_run_do(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in a folder that has of the project what a checkout has."""
    (tmp_path / "convert").symlink_to(ROOT / "convert")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if not block.runs:
            continue
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
            continue
        for words in commands(block):
            assert words[0] == "kvpatch", f"{words} cannot be run by a test"
            run = cli(words[1:])
            assert run.code == 0, run.err


def test_every_page_runs_something() -> None:
    lacking = {"index.md", "api.md", "serving.md", "troubleshooting.md"}
    assert {page.name for page in DOCS} - {page.name for page in _RUNNING} == lacking


@pytest.mark.parametrize("method", ["gqa", "cla", "mla"])
def test_quality_tables_quote_the_results(method: str) -> None:
    page = (ROOT / f"docs/{method}.md").read_text()
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["rows"]
    tables = re.findall(r"<!-- quality -->\n(.+?)\n<!-- /quality -->", page, flags=re.DOTALL)
    assert tables
    for table in tables:
        head, _, *cells = ([c.strip() for c in line[1:-1].split("|")] for line in table.split("\n"))
        for what, *shown in cells:
            of = [row for row in rows if (row["model"], row["what"]) == ("classics-mha-6m", what)]
            lost = {row["step"]: f"{row['lost']:.3f}" for row in of}
            assert shown == [lost.get(step, "") for step in head[1:]]
            assert any(shown)


@pytest.mark.parametrize("page", DOCS, ids=_name)
def test_measured_numbers_stand_in_tables_that_are_compared(page: Path) -> None:
    text = re.sub(r"<!-- quality -->.*?<!-- /quality -->", "", prose(page), flags=re.DOTALL)
    text = re.sub(r"arXiv:\d+\.\d+", "", text)
    assert not re.findall(r"\d\.\d{2,}|\d x ", text)


@pytest.mark.parametrize("page", DOCS, ids=_name)
def test_mathematics_survives_markdown(page: Path) -> None:
    """Markdown takes a backslash before punctuation away, and dollars come in pairs."""
    text = prose(page)
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, flags=re.DOTALL)
    assert "$" not in re.sub(r"\$\$.+?\$\$|\$[^$]+\$", "", text, flags=re.DOTALL)
    for formula in formulas:
        assert not re.search(r"\\[^a-zA-Z]", formula), formula
        assert formula.count("{") == formula.count("}"), formula


_TROUBLE = (ROOT / "docs/troubleshooting.md").read_text()
_SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", _TROUBLE, re.MULTILINE | re.DOTALL))
# where messages are put together before they are raised
_PUT_TOGETHER = {1: "convert/commands/boundary.py", 5: "convert/hub/client.py"}


@pytest.mark.parametrize("title", _SECTIONS)
def test_messages_are_those_of_the_source(title: str) -> None:
    code = int(found[1]) if (found := re.match(r"Exit codes? (\d+)", title)) else None
    raised = {name for name in kvpatch.errors.__all__ if _exit_code(name) == code}
    anywhere, put_together = code in {None, 130}, _PUT_TOGETHER.get(code or 0)
    said = [
        text
        for text, file, error in texts()
        if anywhere or file == put_together or error in raised - {"KvpatchError"}
    ]
    shown = re.findall(r"^\| `(.+?)` \|", _SECTIONS[title], re.MULTILINE)
    for message in shown:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(pattern.fullmatch(" ".join(text.split())) for text in said), message
    assert shown


def _exit_code(error: str) -> int | None:
    return getattr(getattr(kvpatch.errors, error), "exit_code", None)


def test_every_exit_code_is_explained() -> None:
    codes = {_exit_code(name) for name in kvpatch.errors.__all__}
    shown = set(map(int, re.findall(r"^\| (\d+) \|", _TROUBLE, re.MULTILINE)))
    assert shown == {0, 130, 143} | codes - {None}
    titled = set(map(int, re.findall(r"\b\d+\b", " ".join(t for t in _SECTIONS if "xit" in t))))
    assert titled == shown - {0}


def test_serving_lists_what_stands_in_the_way() -> None:
    text = (ROOT / "docs/serving.md").read_text().split("## MLA in servers")[1]
    for rule in serving._RULES:
        problem = re.sub(r"\{\w+\}", "...", rule.problem)
        assert f"| {problem} | {', '.join(rule.servers)} |" in text
    assert len(re.findall(r"\| (?:vLLM|SGLang|llama.cpp)[^|]* \|$", text, re.MULTILINE)) == len(
        serving._RULES
    )


def test_api_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs/api.py"))
    assert made["PAGE"].read_text() == made["page"](), "run make docs"


def test_make_docs_runs_what_makes_them() -> None:
    rule = re.search(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    made = re.findall(r"python (docs/\w+\.py)", rule[1])
    assert made == [_name(path) for path in sorted((ROOT / "docs").glob("*.py"))]


def test_tables_are_filled_with_what_was_measured() -> None:
    page = "a\n<!-- quality -->\n| | x | y |\n|---|---|---|\n| A | 9 | 9 |\n<!-- /quality -->\nb\n"
    filled = runpy.run_path(str(ROOT / "docs/tables.py"))["filled"](page, {("A", "y"): 0.12345})
    assert filled == page.replace("| A | 9 | 9 |", "| A |  | 0.123 |")


@pytest.mark.parametrize("page", DOCS, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in _anchors(target), f"{file}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_index_and_readme_lead_to_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    assert all(f"({page.name})" in index for page in DOCS if page.name != "index.md")
    assert "(docs/index.md)" in (ROOT / "README.md").read_text()
