"""Fills the tables of measured losses in these pages from ``benchmarks/results/quality.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["filled"]

FOLDER = Path(__file__).parent
_RESULTS = FOLDER.parent / "benchmarks/results/quality.json"
_MODEL = "classics-mha-6m"
_TABLE = re.compile(r"(?<=<!-- quality -->\n).*?(?=<!-- /quality -->)", re.DOTALL)


def filled(page: str, lost: Mapping[tuple[str, str], float]) -> str:
    """A page whose tables have the given numbers; which rows and columns there are is its own.

    Args:
        page: Markdown.
        lost: By conversion and step, nats per token.
    """

    def table(found: re.Match[str]) -> str:
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in found[0].splitlines()]
        (_, *steps), dashes, *rows = lines
        rows = [[what, *(_shown(lost.get((what, step))) for step in steps)] for what, *_ in rows]
        head = [f"| {' | '.join(lines[0])} |".replace("|  |", "| |"), f"|{'|'.join(dashes)}|"]
        return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"

    return _TABLE.sub(table, page)


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


if __name__ == "__main__":
    measured = {
        (row["what"], row["step"]): row["lost"]
        for row in json.loads(_RESULTS.read_text())["rows"]
        if row["model"] == _MODEL
    }
    for file in sorted(FOLDER.glob("*.md")):
        file.write_text(filled(file.read_text(), measured))
