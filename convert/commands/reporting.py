"""The command that draws."""

from __future__ import annotations

from typing import Annotated

import typer

from convert.commands.boundary import command
from convert.commands.flags import Debug, Json, Quiet
from convert.console import Console

__all__ = ["report"]


@command
def report(
    outputs: Annotated[
        list[str],
        typer.Argument(metavar="OUT...", help="Converted checkpoints, or folders that hold some."),
    ],
    to: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder to make for plots and tables of one source."),
    ] = None,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Page to write, complete in itself.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier report wrote.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw KV cache against KL, uptraining, lost energy and layer similarity.

    With --to: each plot as PNG, SVG and CSV. With --html: one page of a whole project, with all
    plots, measurements and where everything comes from.

    \b
    Examples:
        kvpatch report ./llama-2-7b-gqa8 ./llama-2-7b-cla2 --to ./report
        kvpatch report ./project --html report.html
    """
    from convert.hub import user_path  # noqa: PLC0415
    from convert.report import write_report  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    written = write_report(
        [user_path(output) for output in outputs],
        to=None if to is None else user_path(to),
        html=None if html is None else user_path(html),
        overwrite=overwrite,
        warn=console.warn,
    )
    data = {"files": [str(file) for file in written.files], "rows": written.rows}
    console.result(data, lambda: console.line("\n".join(data["files"])))
