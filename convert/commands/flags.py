"""The flags that several commands share; each is named like its recipe key."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "AdapterChoice",
    "AllowNonfinite",
    "AllowPickle",
    "Arch",
    "CalibrationText",
    "Context",
    "Debug",
    "Device",
    "DryRun",
    "Dtype",
    "Json",
    "MaxRam",
    "Merge",
    "Output",
    "Overwrite",
    "Quiet",
    "Refit",
    "Resume",
    "Revision",
    "RunDtype",
    "Samples",
    "Seed",
    "Serving",
    "ShardSize",
    "Source",
    "TargetClass",
    "Verbose",
]

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder, or org/name[@revision] on the Hub.")
]
Output = Annotated[str, typer.Argument(metavar="OUT", help="Folder to make; must not exist.")]
Merge = Annotated[str, typer.Option(help="How KV heads become one: mean, first or svd.")]
Refit = Annotated[
    str | None,
    typer.Option(
        help="Least squares after merging, with --calibration: none, q, o or qo; default: qo with "
        "--merge svd (o if queries and keys have a norm), else none."
    ),
]
CalibrationText = Annotated[
    str | None,
    typer.Option("--calibration", help="Text, json, jsonl or parquet file to calibrate on."),
]
Samples = Annotated[int, typer.Option(help="Number of calibration windows.")]
Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a calibration window; default: 512, or the model's limit if less."
    ),
]
Seed = Annotated[int, typer.Option(help="Chooses the calibration windows.")]
Device = Annotated[str, typer.Option(help="Where calibration runs: cpu, cuda, cuda:1, ...")]
TargetClass = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Class to write: native (of transformers) or kvpatch; default: native where one fits.",
    ),
]
Arch = Annotated[str, typer.Option(help="Stock class of a native result: deepseek_v3 or youtu.")]
Serving = Annotated[
    bool, typer.Option("--serving", help="Without biases, as servers of DeepSeek load it.")
]
RunDtype = Annotated[
    str | None,
    typer.Option(
        help="Dtype to run in: float32, bfloat16, float16 or float64; default: float32 on the "
        "CPU, else the model's."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a Hub source; default: its main branch."),
]
AdapterChoice = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="LoRA adapter beside the weights: merge or ignore; default: refuse such a source.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Dtype to write: float32, bfloat16 or float16; default: the source's."),
]
ShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 500MB.")]
MaxRam = Annotated[
    str | None,
    typer.Option(help="Refuse to start if more memory is needed, such as 16GB; default: no limit."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]
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
