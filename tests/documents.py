"""The pages of the project as data: their blocks of code, and the words in them that are code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

__all__ = ["DOCS", "PAGES", "ROOT", "Block", "blocks", "commands", "prose", "spans"]

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *DOCS,
    ROOT / "README.md",
    ROOT / "recipes" / "README.md",
    ROOT / "recipes" / "uptraining" / "other-trainers.md",
]
_RUN = "<!-- run -->"


class Block(NamedTuple):
    """A fenced block of code.

    Args:
        language: What its fence says.
        text: What is in it.
        runs: Whether the page says, in a comment before it, that it runs as it stands.
    """

    language: str
    text: str
    runs: bool


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    tokens = MarkdownIt().parse(page.read_text())
    return [
        Block(token.info, token.content, before.content.strip() == _RUN)
        for before, token in zip([tokens[0], *tokens], tokens, strict=False)
        if token.type == "fence"
    ]


def spans(page: Path) -> list[str]:
    """All inline code of a page."""
    found = MarkdownIt().enable("table").parse(page.read_text())
    return [
        " ".join(child.content.split())
        for token in found
        for child in token.children or ()
        if child.type == "code_inline"
    ]


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


def commands(block: Block) -> Iterator[list[str]]:
    """Words of each command of a shell block; of a session only what follows a prompt."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words:
            yield words
