"""The command that publishes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from convert.commands.boundary import command
from convert.commands.flags import Debug, Json, Quiet
from convert.console import Console

__all__ = ["push"]


@command
def push(
    output: Annotated[str, typer.Argument(metavar="OUT", help="A converted checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="If REPO is new, make it public, not private.")
    ] = False,
    revision: Annotated[
        str, typer.Option(help="Branch to publish on; made if it does not exist.")
    ] = "main",
    message: Annotated[
        str, typer.Option(help="Title of the pull request and its commits.")
    ] = "Upload by kvpatch",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Publish a result on the Hub: upload to a pull request, check every file, merge.

    The access token is that of `hf auth login`, or HF_TOKEN. Interrupted, run it again.

    \b
    Example:
        kvpatch push ./llama-2-7b-gqa8 someone/llama-2-7b-gqa8
    """
    from convert.hub import user_path  # noqa: PLC0415
    from convert.hub.push import push_folder  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    with console.stages() as progress:
        pushed = push_folder(
            user_path(output),
            repository,
            public=public,
            branch=revision,
            message=message,
            progress=progress,
            warn=console.warn,
        )
    if pushed.uploaded:
        console.note(f"{pushed.uploaded} files uploaded, all checked against kvpatch.json")
    else:
        console.note(f"nothing to upload: {pushed.repository} holds all of {output}")
    console.result(asdict(pushed), lambda: console.line(pushed.url))
