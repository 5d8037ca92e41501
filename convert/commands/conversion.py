"""Commands that convert. Their flags are the keys of a recipe, so each makes one and runs it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.commands.boundary import command
from convert.commands.flags import (
    AdapterChoice,
    AllowNonfinite,
    AllowPickle,
    Arch,
    CalibrationText,
    Context,
    Debug,
    Device,
    DryRun,
    Dtype,
    Json,
    MaxRam,
    Merge,
    Output,
    Overwrite,
    Quiet,
    Refit,
    Resume,
    Revision,
    Samples,
    Seed,
    Serving,
    ShardSize,
    Source,
    TargetClass,
    Verbose,
)
from convert.commands.training import run_uptraining
from convert.console import Console

if TYPE_CHECKING:
    from convert.recipe import Recipe

__all__ = ["cla", "export", "gqa", "mla", "mqa", "run"]


@command
def gqa(
    source: Source,
    output: Output,
    kv_heads: Annotated[int, typer.Option(help="KV heads of each layer afterwards.")],
    merge: Merge = "mean",
    group: Annotated[
        str | None,
        typer.Option(
            help="Which heads become one: adjacent, or similar with --merge svd; default: similar "
            "if it goes and there is a --calibration, else adjacent."
        ),
    ] = None,
    refit: Refit = None,
    calibration: CalibrationText = None,
    samples: Samples = 96,
    context: Context = None,
    seed: Seed = 0,
    device: Device = "cpu",
    target: TargetClass = None,
    adapter: AdapterChoice = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    max_ram: MaxRam = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Pool the KV heads of every layer into fewer (grouped-query attention).

    \b
    Examples:
        kvpatch gqa meta-llama/Llama-2-7b-hf ./llama-2-7b-gqa8 --kv-heads 8
        kvpatch gqa ./llama-2-7b ./out --kv-heads 8 --merge svd --calibration train.txt
    """
    _convert(_recipe("gqa", locals()), dry_run, Console(json=json, quiet=quiet, verbose=verbose))


@command
def mqa(
    source: Source,
    output: Output,
    merge: Merge = "mean",
    refit: Refit = None,
    calibration: CalibrationText = None,
    samples: Samples = 96,
    context: Context = None,
    seed: Seed = 0,
    device: Device = "cpu",
    target: TargetClass = None,
    adapter: AdapterChoice = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    max_ram: MaxRam = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Pool the KV heads of every layer into one (multi-query attention).

    \b
    Example:
        kvpatch mqa ./llama-2-7b ./llama-2-7b-mqa
    """
    _convert(_recipe("mqa", locals()), dry_run, Console(json=json, quiet=quiet, verbose=verbose))


@command
def cla(
    source: Source,
    output: Output,
    share: Annotated[int, typer.Option(help="Layers for each set of keys and values.")],
    kv_heads: Annotated[
        int | None,
        typer.Option(help="KV heads of each layer afterwards; default: as many as before."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Layers that take part, FIRST:END, where : is all; auto chooses those that lose "
            "least."
        ),
    ] = ":",
    merge: Merge = "mean",
    match: Annotated[
        bool,
        typer.Option(
            "--match/--no-match", help="With --merge svd: pair heads of layers by what they lose."
        ),
    ] = True,
    refit: Refit = None,
    calibration: CalibrationText = None,
    samples: Samples = 96,
    context: Context = None,
    seed: Seed = 0,
    device: Device = "cpu",
    adapter: AdapterChoice = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    max_ram: MaxRam = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Let adjacent layers share keys and values (cross-layer attention).

    \b
    Examples:
        kvpatch cla ./llama-2-7b ./llama-2-7b-cla2 --share 2
        kvpatch cla ./llama-2-7b ./out --share 2 --kv-heads 8 --merge svd --calibration train.txt
    """
    _convert(_recipe("cla", locals()), dry_run, Console(json=json, quiet=quiet, verbose=verbose))


@command
def mla(
    source: Source,
    output: Output,
    rank: Annotated[
        int | None, typer.Option(help="Dims of the latent; --rope-dims goes with it.")
    ] = None,
    rope_dims: Annotated[
        int | None, typer.Option(help="Dims of the rotary key that all heads share; even.")
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            help="In place of both: share of the source's KV cache, such as 25%, or rank and "
            "rotary dims, such as 512+64."
        ),
    ] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Divide a --kv-budget such as 25% among the layers by what they would lose.",
        ),
    ] = False,
    share: Annotated[int | None, typer.Option(help="Layers for each latent; default: 1.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="With --share: layers that take part, FIRST:END; default: all."),
    ] = None,
    rope_select: Annotated[
        str | None,
        typer.Option(
            help="What stays rotary: greedy, per-frequency or stride; default: greedy, or stride "
            "with --serving."
        ),
    ] = None,
    refit: Annotated[
        str | None,
        typer.Option(
            help="Least squares afterwards: none, q, o or qo; default: qo with --calibration, else "
            "none."
        ),
    ] = None,
    calibration: CalibrationText = None,
    samples: Samples = 96,
    context: Context = None,
    seed: Seed = 0,
    device: Device = "cpu",
    target: TargetClass = None,
    arch: Arch = "deepseek_v3",
    serving: Serving = False,
    adapter: AdapterChoice = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    max_ram: MaxRam = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Factor keys and values into one latent per token (multi-head latent attention).

    \b
    Examples:
        kvpatch mla ./llama-2-7b ./llama-2-7b-mla --kv-budget 512+64 --calibration train.txt
        kvpatch mla ./llama-2-7b ./out --rank 448 --rope-dims 64 --target kvpatch
        kvpatch mla ./llama-2-7b ./out --kv-budget 5% --per-layer --calibration train.txt
        kvpatch mla ./llama-2-7b ./out --kv-budget 5% --share 2 --calibration train.txt
    """
    _convert(_recipe("mla", locals()), dry_run, Console(json=json, quiet=quiet, verbose=verbose))


@command
def export(
    source: Annotated[
        str, typer.Argument(metavar="OUT", help="A result of kvpatch mla, trained or not.")
    ],
    output: Annotated[str, typer.Argument(metavar="NEW", help="Folder to make; must not exist.")],
    target: Annotated[
        str, typer.Option(help="Class to write: native (of transformers) or kvpatch.")
    ],
    arch: Arch = "deepseek_v3",
    serving: Serving = False,
    adapter: AdapterChoice = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    max_ram: MaxRam = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a model with latents for another class; it computes the same.

    \b
    Examples:
        kvpatch export ./llama-2-7b-mla ./to-train --target kvpatch
        kvpatch export ./trained ./to-serve --target native --serving
    """
    _convert(_recipe("export", locals()), dry_run, Console(json=json, quiet=quiet, verbose=verbose))


@command
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run the conversion or the uptraining that a recipe describes.

    \b
    Example:
        kvpatch run recipes/llama-2-7b-gqa8.yaml --set source=./llama-2-7b
    """
    from convert.recipe_file import load_recipe  # noqa: PLC0415
    from convert.training.recipe import UptrainRecipe  # noqa: PLC0415

    loaded = load_recipe(recipe, set_ or ())
    console = Console(json=json, quiet=quiet, verbose=verbose)
    if isinstance(loaded, UptrainRecipe):
        run_uptraining(loaded, dry_run, console)
    else:
        _convert(loaded, dry_run, console)


def _recipe(method: str, options: dict[str, Any]) -> Recipe:
    """The recipe of a command's flags; each flag has the name of its key."""
    from convert.recipe import make_recipe  # noqa: PLC0415

    invocation = {"dry_run", "json", "quiet", "verbose", "debug"}
    values = {key: value for key, value in options.items() if key not in invocation}
    return make_recipe({"method": method, **values})


def _convert(recipe: Recipe, dry_run: bool, console: Console) -> None:
    from convert import pipeline  # noqa: PLC0415

    if dry_run:
        _show_plan(recipe, console)
        return
    with console.stages() as progress:
        out = pipeline.convert(recipe, progress=progress, warn=console.warn)
    if console.verbose:
        from convert.checkpoint.manifest import read_manifest  # noqa: PLC0415

        for result in read_manifest(out)["layers"]:
            console.note(", ".join(f"{key} {value}" for key, value in result.items()))
    console.note(f"converted to {out}; check it with: kvpatch verify {shlex.quote(str(out))}")
    console.result({"output": str(out)}, lambda: console.line(str(out)))


def _show_plan(recipe: Recipe, console: Console) -> None:
    from convert import pipeline, views  # noqa: PLC0415
    from convert.preparing import prepare  # noqa: PLC0415

    with prepare(recipe) as prepared:
        for warning in prepared.warnings + pipeline.obstacles(prepared):
            console.warn(warning)
        data = views.plan_data(prepared)
        console.result(data, lambda: views.print_plan(data, console))
