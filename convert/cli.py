"""The command line. Heavy imports wait until a command runs: ``--help`` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from convert.commands import (
    benchmarking,
    checking,
    conversion,
    measuring,
    publishing,
    reporting,
    training,
)
from convert.commands.boundary import app
from convert.console import Console
from convert.signals import ending_soon
from kvpatch import __version__

__all__ = [
    "app",
    "benchmarking",
    "checking",
    "conversion",
    "main",
    "measuring",
    "publishing",
    "reporting",
    "training",
]


def _version(show: bool) -> None:
    if show:
        Console().line(f"kvpatch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``kvpatch`` command."""
    with ending_soon():
        app()
