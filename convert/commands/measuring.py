"""The command that measures a model, and compares it with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from convert.commands.boundary import command
from convert.commands.flags import Debug, Json, Quiet
from convert.console import Console
from kvpatch.errors import UsageError

__all__ = ["eval"]

_N = TypeVar("_N", int, float)


@command
def eval(  # noqa: A001 - the command's name
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or org/name[@revision].")],
    text: Annotated[
        Path | None, typer.Option(help="Text file to measure on, and around the keys.")
    ] = None,
    retrieval: Annotated[
        bool, typer.Option("--retrieval", help="Ask for keys stated far back in a text.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The source, to compare with.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window; default 512.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; default: no overlap.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Use the first windows only.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Retrieval: tokens of the texts, 256,512; default: up to 4,096."),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Retrieval: where the key is stated, in percent.")
    ] = "0,25,50,75,100",
    trials: Annotated[int, typer.Option(min=1, help="Retrieval: number of keys.")] = 20,
    key: Annotated[str, typer.Option(help="Retrieval: keys of digits or words.")] = "digits",
    seed: Annotated[int, typer.Option(min=0, help="Retrieval: draws keys and texts.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Tasks: ask only the first questions of each.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Tasks: solved examples before each question.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Tasks: folder with more of them.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Dtype to run in; float32 on the CPU.")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write the result into MODEL's card and kvpatch.json.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model, and how far it is from its source.

    With --text: perplexity, KL to the source, same top tokens. With --retrieval: keys stated
    once in a long text and asked for at its end, by length and depth. With --tasks: tasks of
    lm-evaluation-harness, paired question by question.

    \b
    Examples:
        kvpatch eval ./llama-2-7b-gqa8 --text valid.txt --against ./llama-2-7b
        kvpatch eval ./llama-2-7b-gqa8 --retrieval --lengths 1024,4096 --against ./llama-2-7b
        kvpatch eval ./llama-2-7b-gqa8 --tasks arc_easy,piqa --against ./llama-2-7b
    """
    if text is None and not retrieval and tasks is None:
        raise UsageError("nothing to measure", hint="Give --text FILE, --retrieval or --tasks.")
    sizes = None if lengths is None else _numbers("--lengths", lengths, int)
    places = _numbers("--depths", depths, float)

    from convert import loading, results, views  # noqa: PLC0415
    from convert.evaluate import measure_text  # noqa: PLC0415
    from convert.harness import check_harness, run_tasks  # noqa: PLC0415
    from convert.hub import fetch_source  # noqa: PLC0415
    from convert.retrieval import built_in_text, measure_retrieval  # noqa: PLC0415
    from convert.texts import read_text  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    folder = fetch_source(model).path
    content = read_text(text) if text is not None else None
    if tasks is not None:
        check_harness()
    if save:  # before the work, not after it
        results.check_saveable(folder)
        if content is not None:
            results.check_text(folder, content)
    pair = loading.load_pair(
        folder,
        fetch_source(against).path if against is not None else None,
        dtype=results.torch_dtype(dtype),
        device=device,
    )
    measured: dict[str, list[dict[str, Any]]] = {}
    if content is not None:
        with console.progress("evaluating", unit="windows") as progress:
            evaluation = measure_text(
                pair,
                content,
                context=context,
                stride=stride,
                samples=samples,
                batch=batch,
                progress=progress,
            )
        measured["evaluations"] = [asdict(evaluation)]
    if retrieval:
        with console.progress("retrieving", unit="texts") as progress:
            probe = measure_retrieval(
                pair,
                content or built_in_text(),
                lengths=sizes,
                depths=places,
                trials=trials,
                key=key,
                seed=seed,
                batch=batch,
                progress=progress,
            )
        measured["retrieval"] = [asdict(probe)]
    if tasks is not None:
        with console.bars_of_others():
            scores = run_tasks(
                pair,
                tasks.split(","),
                limit=limit,
                num_fewshot=num_fewshot,
                include_path=include_path,
                batch=batch,
            )
        measured["tasks"] = [asdict(score) for score in scores]
    console.result(views.measured_data(measured), lambda: views.print_measured(measured, console))
    if save:
        results.save_results(folder, measured)


def _numbers(flag: str, words: str, kind: Callable[[str], _N]) -> list[_N]:
    try:
        return [kind(word) for word in words.split(",")]
    except ValueError as error:
        raise UsageError(f"{flag} {words}: give numbers with commas between them") from error
