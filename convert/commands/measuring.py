"""The command that measures a model, and compares it with its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.commands.boundary import command
from convert.commands.flags import AdapterChoice, Debug, Json, Quiet, RunDtype
from convert.console import Console
from kvpatch.errors import UsageError

if TYPE_CHECKING:
    from convert.loading import Pair
    from convert.texts import Text

__all__ = ["eval"]


@command
def eval(  # noqa: A001 - the command's name
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or org/name[@revision].")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text, json, jsonl or parquet file to measure on, and around the keys."),
    ] = None,
    retrieval: Annotated[
        bool, typer.Option("--retrieval", help="Ask for keys stated far back in a text.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The source, to compare with.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Text: tokens of a window; default: 512.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Text: tokens between windows; default: no overlap.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Text: windows from its start; default: all.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Retrieval: tokens of the texts, 256,512; default: up to 4,096."),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Retrieval: where the key is stated, in percent; default: 0,25,50,75,100."
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Retrieval: number of keys; default: 20.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Retrieval: keys of digits or words; default: digits.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Retrieval: draws keys and texts; default: 0.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Tasks: first questions of each; default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tasks: solved examples before each question; default: the task's own number.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Tasks: folder with more of them.")
    ] = None,
    adapter: AdapterChoice = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: RunDtype = None,
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
    options = locals()
    kinds = _kinds(options)
    console = Console(json=json, quiet=quiet)
    _measure(options, {kind: _settings(kind, options) for kind in kinds}, console)


# what can be measured, and the flags that are for it alone
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "text": ("context", "stride", "samples"),
    "retrieval": ("lengths", "depths", "trials", "key", "seed"),
    "tasks": ("limit", "num_fewshot", "include_path"),
}
_NUMBERS: Mapping[str, Callable[[str], float]] = {"lengths": int, "depths": float}


def _kinds(options: Mapping[str, Any]) -> list[str]:
    """What is to be measured.

    Raises:
        UsageError: If nothing is, or a flag is for something that is not.
    """
    kinds = [kind for kind in _FLAGS if options[kind]]
    if not kinds:
        raise UsageError("nothing to measure", hint="Give --text FILE, --retrieval or --tasks.")
    for kind in _FLAGS.keys() - set(kinds):
        for key in _FLAGS[kind]:
            if options[key] is not None:
                flag = f"--{key.replace('_', '-')}"
                raise UsageError(
                    f"{flag} is for --{kind}, which is not asked for",
                    hint=f"Give --{kind}, or leave {flag} out.",
                )
    return kinds


def _settings(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of what measures one kind; what was not given keeps its default."""
    given = {key: options[key] for key in _FLAGS[kind] if options[key] is not None}
    return {
        key: _numbers(f"--{key}", value, _NUMBERS[key]) if key in _NUMBERS else value
        for key, value in given.items()
    }


def _measure(
    options: Mapping[str, Any], settings: Mapping[str, dict[str, Any]], console: Console
) -> None:
    """Measure all kinds on one loaded pair, show the results and save them if asked to."""
    from convert import loading, results, views  # noqa: PLC0415
    from convert.adapters import adapter_choice  # noqa: PLC0415
    from convert.harness import check_harness  # noqa: PLC0415
    from convert.hub import fetch_source  # noqa: PLC0415
    from convert.texts import read_text  # noqa: PLC0415

    folder, against = fetch_source(options["model"]).path, options["against"]
    content = read_text(options["text"]) if "text" in settings else None
    for warning in () if content is None else content.warnings:
        console.warn(warning)
    if "tasks" in settings:
        check_harness()
    if options["save"]:  # before the work, not after it
        results.check_saveable(folder)
        if content is not None:
            results.check_text(folder, content)
    pair = loading.load_pair(
        folder,
        fetch_source(against).path if against is not None else None,
        dtype=results.torch_dtype(options["dtype"]),
        device=options["device"],
        adapter=adapter_choice(options["adapter"]),
    )
    measured = _measured(pair, content, options, settings, console)
    console.result(views.measured_data(measured), lambda: views.print_measured(measured, console))
    if options["save"]:
        results.save_results(folder, measured)


def _measured(
    pair: Pair,
    content: Text | None,
    options: Mapping[str, Any],
    settings: Mapping[str, dict[str, Any]],
    console: Console,
) -> dict[str, list[dict[str, Any]]]:
    """Results by kind, as ``save_results`` takes them."""
    from convert.evaluate import measure_text  # noqa: PLC0415
    from convert.harness import run_tasks  # noqa: PLC0415
    from convert.retrieval import built_in_text, measure_retrieval  # noqa: PLC0415

    common = {"batch": options["batch"], "warn": console.warn}
    measured = dict[str, list[dict[str, Any]]]()
    if content is not None:
        with console.progress("evaluating", unit="windows") as progress:
            how = settings["text"]
            evaluation = measure_text(pair, content, **how, **common, progress=progress)
        measured["evaluations"] = [asdict(evaluation)]
    if "retrieval" in settings:
        with console.progress("retrieving", unit="texts") as progress:
            around, how = content or built_in_text(), settings["retrieval"]
            probe = measure_retrieval(pair, around, **how, **common, progress=progress)
        measured["retrieval"] = [asdict(probe)]
    if "tasks" in settings:
        with console.bars_of_others():
            names = options["tasks"].split(",")
            scores = run_tasks(pair, names, **settings["tasks"], batch=options["batch"])
        measured["tasks"] = [asdict(score) for score in scores]
    return measured


def _numbers(flag: str, words: str, kind: Callable[[str], float]) -> list[float]:
    try:
        return [kind(word) for word in words.split(",")]
    except ValueError as error:
        raise UsageError(f"{flag} {words}: give numbers with commas between them") from error
