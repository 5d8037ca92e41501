"""The command that trains. Its flags are the keys of a recipe."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.commands.boundary import command
from convert.commands.flags import Debug, DryRun, Json, Overwrite, Quiet, Resume
from convert.console import Console

if TYPE_CHECKING:
    from convert.training.recipe import UptrainRecipe

__all__ = ["run_uptraining", "uptrain"]


@command
def uptrain(
    source: Annotated[
        str, typer.Argument(metavar="OUT", help="A result of kvpatch; it stays as it is.")
    ],
    output: Annotated[str, typer.Argument(metavar="NEW", help="Folder to make; must not exist.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text, json, jsonl or parquet file, or hub:NAME[:CONFIG][@SPLIT], a data set."
        ),
    ],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, such as 300k or 1.5M.")],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Model to learn from; default: what OUT was made from, if it was on the Hub."
        ),
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option(help="Text, json, jsonl or parquet file to measure on meanwhile.")
    ] = None,
    eval_samples: Annotated[int, typer.Option(help="Sequences of --eval-text to measure on.")] = 32,
    eval_every: Annotated[
        str | None, typer.Option(help="Tokens between measurements; default: a twentieth of all.")
    ] = None,
    kl_target: Annotated[
        float | None,
        typer.Option(help="Stop once the KL on --eval-text is not above this, in nats per token."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences in one forward pass of one device.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence; default: 512, or the model's limit if less."),
    ] = None,
    grad_accumulation: Annotated[int, typer.Option(help="Forward passes for each step.")] = 1,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate; 1.5 times that if layers share KV.")
    ] = 1e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.05,
    decay: Annotated[str, typer.Option(help="How it falls: cosine, linear, constant.")] = "cosine",
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    kl: Annotated[float, typer.Option(help="Weight of the KL to the teacher.")] = 1.0,
    ce: Annotated[float, typer.Option(help="Weight of the cross entropy of the text.")] = 0.0,
    hidden_mse: Annotated[
        float, typer.Option(help="Weight of the error of hidden states, in the first phase.")
    ] = 0.0,
    groups: Annotated[
        str, typer.Option(help="What is trained: attention, all or attention-then-all.")
    ] = "all",
    first_phase: Annotated[
        float, typer.Option(help="Share of the steps in the first phase, if there are two.")
    ] = 0.2,
    lora: Annotated[
        int | None,
        typer.Option(help="Rank of adapters, merged at the end; default: none, all weights."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16 or fp32; default: bf16 on GPUs and fp32 on CPUs.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more arithmetic.")
    ] = False,
    checkpoint_every: Annotated[
        str | None, typer.Option(help="Tokens between checkpoints; default: a twentieth of all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the text.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a converted model towards its source, and win back what the conversion lost.

    \b
    Examples:
        kvpatch uptrain ./llama-2-7b-gqa8 ./trained --data corpus.jsonl --tokens 100M
        kvpatch uptrain ./out ./new --teacher ./src --data a.txt --eval-text b.txt --tokens 300k
    """
    _run("uptrain", locals())


def _run(method: str, options: dict[str, Any]) -> None:
    """Make the recipe of the flags, each of which has the name of its key, and run it."""
    from convert.recipe import validated  # noqa: PLC0415
    from convert.training.recipe import UptrainRecipe  # noqa: PLC0415

    invocation = {"dry_run", "json", "quiet", "debug"}
    values = {key: value for key, value in options.items() if key not in invocation}
    recipe = validated(UptrainRecipe, {"method": method, **values})
    console = Console(json=options["json"], quiet=options["quiet"])
    run_uptraining(recipe, options["dry_run"], console)


def run_uptraining(recipe: UptrainRecipe, dry_run: bool, console: Console) -> None:
    """Train, or show what would be done."""
    from convert.training import run, views  # noqa: PLC0415

    if dry_run:
        with run.prepare(recipe) as prepared:
            for warning in prepared.warnings:
                console.warn(warning)
            data = views.plan_data(prepared)
            console.result(data, lambda: views.print_plan(data, console))
        return
    with console.stages() as progress:
        out = run.uptrain(recipe, progress=progress, note=console.note, warn=console.warn)
    if out is None:  # another process publishes
        return
    console.note(f"trained to {out}; check it with: kvpatch verify {shlex.quote(str(out))}")
    console.result({"output": str(out)}, lambda: console.line(str(out)))
