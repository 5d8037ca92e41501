"""The flags that several commands share; each is named like its recipe key."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "AllowNonfinite",
    "AllowPickle",
    "Debug",
    "DryRun",
    "Dtype",
    "Json",
    "MaxRam",
    "Merge",
    "Output",
    "Overwrite",
    "Quiet",
    "Resume",
    "Revision",
    "ShardSize",
    "Source",
    "Verbose",
]

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder, or org/name[@revision] on the Hub.")
]
Output = Annotated[str, typer.Argument(metavar="OUT", help="Folder to make; must not exist.")]
Merge = Annotated[str, typer.Option(help="How KV heads become one: mean, first or svd.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Dtype to write: float32, bfloat16 or float16; else the source's."),
]
ShardSize = Annotated[str, typer.Option(help="Largest weight file.")]
MaxRam = Annotated[str | None, typer.Option(help="Refuse to start if more memory is needed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan from headers alone.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result at the output.")
]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run, or start over.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights, without running their code.")
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Copy weights that hold NaN or infinity.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print results and errors only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print more detail.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
