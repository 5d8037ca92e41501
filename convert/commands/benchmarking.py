"""The command that measures speed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from convert.commands.boundary import command
from convert.commands.flags import AdapterChoice, Debug, Json, Quiet, RunDtype
from convert.console import Console

__all__ = ["bench"]


@command
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or org/name[@revision].")],
    against: Annotated[str | None, typer.Option(help="The source, to compare with.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians count.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: RunDtype = None,
    adapter: AdapterChoice = None,
    patched: Annotated[
        bool | None,
        typer.Option(
            "--patched/--no-patched",
            help="Only with kvpatch.patch, or only without; both if not given.",
        ),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw it too: a new .png or .svg file.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure tokens per second, cache and memory, stock and patched.

    \b
    Examples:
        kvpatch bench ./llama-2-7b-gqa8 --against ./llama-2-7b --device cuda --batch 8
        kvpatch bench ./llama-2-7b-mla --prompt 8192 --plot speed.png
    """
    from convert import results, views  # noqa: PLC0415
    from convert.adapters import adapter_choice  # noqa: PLC0415
    from convert.bench import bench_checkpoints  # noqa: PLC0415
    from convert.hub import fetch_source, user_path  # noqa: PLC0415
    from convert.reporting.speed import check_plot, write_plot  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    picture = None if plot is None else check_plot(user_path(plot))
    names = [name for name in (against, model) if name is not None]
    with console.progress("measuring", unit="rounds") as progress:
        measured = bench_checkpoints(
            [(name, fetch_source(name).path) for name in names],
            prompt=prompt,
            new=new,
            batch=batch,
            rounds=rounds,
            device=device,
            dtype=results.torch_dtype(dtype),
            adapter=adapter_choice(adapter),
            patched=patched,
            progress=progress,
            note=console.warn,
        )
    data = asdict(measured)
    if picture is not None:
        write_plot(data, picture)
        console.note(f"drawn in {picture}")
    console.result(data, lambda: views.print_bench(data, console))
