"""The flags of the commands, and texts that name them."""

from __future__ import annotations

import re
from typing import Any

import typer

from convert.cli import app

__all__ = ["COMMANDS", "flags_of", "unknown_flags"]

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def flags_of(command: str) -> set[str]:
    """All flags of a command."""
    own = {flag for p in COMMANDS[command].params for flag in (*p.opts, *p.secondary_opts)}
    return own | {"--help"}


def unknown_flags(command: str, text: str) -> set[str]:
    """Flags in a text that neither the command at hand has, nor the one that the text names."""
    unknown, name = set[str](), command
    text = re.sub(r"\bhf \w.*", "", text)  # the command line of the Hub
    for part in re.split(r"(?=kvpatch \w)", text):
        named = re.match(r"kvpatch (\w+)", part)
        name = named[1] if named and named[1] in COMMANDS else name
        advised = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", part))
        unknown |= {f"kvpatch {name} {flag}" for flag in advised - flags_of(name)}
    return unknown
