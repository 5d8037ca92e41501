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
        list[str], typer.Argument(metavar="OUT...", help="Converted checkpoints of one source.")
    ],
    to: Annotated[str, typer.Option(metavar="FOLDER", help="Folder to make for plots and tables.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the plots of an earlier report.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw KV cache against KL, lost energy and layer similarity, as PNG, SVG and CSV.

    \b
    Example:
        kvpatch report ./llama-2-7b-gqa8 ./llama-2-7b-cla2 --to ./report
    """
    from convert.hub import user_path  # noqa: PLC0415
    from convert.report import write_report  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    written = write_report(
        [user_path(output) for output in outputs],
        user_path(to),
        overwrite=overwrite,
        warn=console.warn,
    )
    data = {"files": [str(file) for file in written.files], "rows": written.rows}
    console.result(data, lambda: console.line("\n".join(data["files"])))
