"""The command line. Heavy imports wait until a command runs: ``--help`` answers at once."""

from __future__ import annotations

import functools
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.console import Console
from convert.flags import (
    AllowNonfinite,
    AllowPickle,
    Debug,
    DryRun,
    Dtype,
    Json,
    MaxRam,
    Merge,
    Output,
    Overwrite,
    Quiet,
    Resume,
    Revision,
    ShardSize,
    Source,
    Verbose,
)
from kvpatch import __version__
from kvpatch.errors import KvpatchError, Terminated, UsageError, VerificationError

if TYPE_CHECKING:
    from convert.recipe import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="kvpatch",
    help="Convert pretrained attention checkpoints to a smaller KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command behind the error boundary: one message and the right exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **options: Any) -> None:
        debug = bool(options.get("debug"))
        try:
            function(*args, **options)
        except KvpatchError as error:
            raise typer.Exit(_report(error.message, error.hint, error.exit_code, debug)) from None
        except KeyboardInterrupt as interrupt:
            terminated = isinstance(interrupt, Terminated)
            what = "terminated" if terminated else "interrupted"
            hint = None
            if function.__name__ in {"gqa", "mqa", "run"}:
                hint = "Finished shards are kept; run the same command again to continue."
            raise typer.Exit(_report(what, hint, 143 if terminated else 130, debug)) from None
        except BrokenPipeError:  # the reader of stdout went away, as `| head` does
            raise typer.Exit(0) from None
        except OSError as error:
            message = f"{error.filename or 'a file'}: {error.strerror or error}"
            raise typer.Exit(_report(message, None, UsageError.exit_code, debug)) from None
        except Exception as error:
            message = f"this is a bug in kvpatch: {type(error).__name__}: {error}"
            raise typer.Exit(
                _report(message, "Run with --debug and report it.", 1, debug)
            ) from None

    app.command()(guarded)
    return guarded


def _report(message: str, hint: str | None, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc(file=sys.stderr)
    console = Console()
    console.note(f"error: {message}")
    if hint:
        console.note(f"hint: {hint}")
    return code


@_command
def inspect(
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", help="Folder, or org/name[@revision].")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the cache.")] = 1,
    layers: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Without SRC: layers.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Without SRC: query heads.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Without SRC: head width.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Without SRC: KV heads.")] = None,
    value_bytes: Annotated[
        int | None, typer.Option(min=1, help="Without SRC: bytes of a number; default 2.")
    ] = None,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show a model's attention and its KV cache now and under every conversion.

    \b
    Examples:
        kvpatch inspect ./llama-2-7b --context 32768 --batch 8
        kvpatch inspect --layers 61 --heads 128 --head-dim 128 --context 100000
    """
    from convert import inspection, views  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    if source is not None:
        if layers or heads or head_dim or kv_heads or value_bytes:
            raise UsageError("give either SRC, or --layers, --heads and the like")
        facts, warnings = inspection.inspect_source(source, revision=revision)
        description, rows = inspection.describe(facts), inspection.facts_rows(facts)
        for warning in warnings:
            console.warn(warning)
    elif layers and heads and head_dim:
        if revision is not None:
            raise UsageError("--revision goes with SRC")
        if kv_heads and heads % kv_heads:
            raise UsageError(f"--kv-heads {kv_heads} does not divide --heads {heads}")
        description = {}
        rows = inspection.inspect_dims(
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            kv_heads=kv_heads,
            bytes_per_value=value_bytes or 2,
        )
    else:
        raise UsageError("give SRC, or --layers, --heads and --head-dim")
    data = views.cache_data(description, rows, context=context, batch=batch)
    console.result(data, lambda: views.print_cache(data, console))


@_command
def gqa(
    source: Source,
    output: Output,
    kv_heads: Annotated[int, typer.Option(help="KV heads of each layer afterwards.")],
    merge: Merge = "mean",
    group: Annotated[
        str, typer.Option(help="Which heads become one: adjacent, or similar with --merge svd.")
    ] = "adjacent",
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
    Example:
        kvpatch gqa meta-llama/Llama-2-7b-hf ./llama-2-7b-gqa8 --kv-heads 8
    """
    _convert(_recipe("gqa", locals()), dry_run, Console(json=json, quiet=quiet, verbose=verbose))


@_command
def mqa(
    source: Source,
    output: Output,
    merge: Merge = "mean",
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


@_command
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
    """Run the conversion that a recipe describes.

    \b
    Example:
        kvpatch run recipes/llama-2-7b-gqa8.yaml --set source=./llama-2-7b
    """
    from convert.recipe import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe, set_ or ())
    _convert(loaded, dry_run, Console(json=json, quiet=quiet, verbose=verbose))


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
    with console.progress("converting", unit="bytes") as progress:
        out = pipeline.convert(recipe, progress=progress, warn=console.warn)
    if console.verbose:
        from convert.checkpoint.manifest import read_manifest  # noqa: PLC0415

        for result in read_manifest(out)["layers"]:
            console.note(", ".join(f"{key} {value}" for key, value in result.items()))
    console.note(f"converted to {out}; check it with: kvpatch verify {shlex.quote(str(out))}")
    console.result({"output": str(out)}, lambda: console.line(str(out)))


def _show_plan(recipe: Recipe, console: Console) -> None:
    from convert import pipeline, views  # noqa: PLC0415

    with pipeline.prepare(recipe) as prepared:
        for warning in prepared.warnings + pipeline.obstacles(prepared):
            console.warn(warning)
        data = views.plan_data(prepared)
        console.result(data, lambda: views.print_plan(data, console))


@_command
def verify(
    output: Annotated[str, typer.Argument(metavar="OUT", help="A converted checkpoint.")],
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", help="What it was made from.")
    ] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Do not load and run the model.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check hashes, shapes, numbers, loading, and decoding with a cache.

    \b
    Example:
        kvpatch verify ./llama-2-7b-gqa8 ./llama-2-7b
    """
    from convert.hub import fetch_source  # noqa: PLC0415
    from convert.verify import verify_checkpoint  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    checks = verify_checkpoint(
        fetch_source(output).path,
        fetch_source(source).path if source is not None else None,
        run=not files_only,
        progress=console.note,
    )
    rows = [(check.name, check.status, check.detail) for check in checks]
    failed = [check.name for check in checks if check.status == "failed"]
    data = {"ok": not failed, "checks": [asdict(check) for check in checks]}
    console.result(data, lambda: console.table("", ["check", "", "finding"], rows, numeric=3))
    if failed:
        raise VerificationError(f"{output}: failed {', '.join(failed)}")


@_command
def eval(  # noqa: A001 - the command's name
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or org/name[@revision].")],
    text: Annotated[Path, typer.Option(help="Text file to measure on.")],
    against: Annotated[str | None, typer.Option(help="The source, to compare with.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window; default 512.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; default: no overlap.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Use the first windows only.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Dtype to run in; float32 on the CPU.")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write the result into MODEL's card and kvpatch.json.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity on a text, and how far the model is from its source.

    \b
    Example:
        kvpatch eval ./llama-2-7b-gqa8 --text valid.txt --against ./llama-2-7b
    """
    from convert import evaluate, results, views  # noqa: PLC0415
    from convert.hub import fetch_source  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    folder = fetch_source(model).path
    if save:
        results.check_saveable(folder)  # before the work, not after it
    with console.progress("evaluating", unit="windows") as progress:
        evaluation = evaluate.evaluate_checkpoint(
            folder,
            text,
            against=fetch_source(against).path if against is not None else None,
            context=context,
            stride=stride,
            samples=samples,
            batch=batch,
            device=device,
            dtype=results.torch_dtype(dtype),
            progress=progress,
        )
    data = asdict(evaluation)
    console.result(data, lambda: views.print_evaluation(data, console))
    if save:
        results.save_evaluation(folder, data)


@_command
def demo(
    keep: Annotated[
        Path | None, typer.Option(help="Keep the converted models in this new folder.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert the bundled small model in every way and show what each way costs."""
    from convert.demo import run_demo  # noqa: PLC0415

    run_demo(Console(json=json, quiet=quiet), keep)


def _version(show: bool) -> None:
    if show:
        Console().line(f"kvpatch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``kvpatch`` command."""
    app()
