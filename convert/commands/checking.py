"""Commands that look: at a model, at a result, at the demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from convert.commands.boundary import command
from convert.commands.flags import Debug, Json, Quiet, Revision
from convert.console import Console
from kvpatch.errors import InputModelError, UsageError, VerificationError

__all__ = ["demo", "inspect", "reindex", "verify"]


@command
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
    head_dim: Annotated[
        int | None, typer.Option(min=1, help="Without SRC: head width, in dims.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Without SRC: KV heads; default: as many as --heads.")
    ] = None,
    value_bytes: Annotated[
        int | None, typer.Option(min=1, help="Without SRC: bytes of a number; default: 2.")
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
    from convert import adapters, inspection, views  # noqa: PLC0415

    console = Console(json=json, quiet=quiet)
    if source is not None:
        if layers or heads or head_dim or kv_heads or value_bytes:
            raise UsageError("give either SRC, or --layers, --heads and the like")
        text, at, adapter = adapters.described(source, revision)
        facts, warnings = inspection.inspect_source(text, revision=at)
        description, rows = inspection.describe(facts), inspection.facts_rows(facts)
        for warning in warnings if adapter is None else [adapter, *warnings]:
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


@command
def reindex(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder with all shards.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make model.safetensors.index.json anew from the shards of a checkpoint.

    \b
    Example:
        kvpatch reindex ./llama-2-7b
    """
    from convert.checkpoint.index import INDEX, write_index  # noqa: PLC0415
    from convert.hub import user_path  # noqa: PLC0415

    console, path = Console(json=json, quiet=quiet), user_path(folder)
    if not path.is_dir():
        raise InputModelError(f"{folder} is not a folder")
    count = write_index(path)
    console.note(f"the index names {count:,} tensors")
    console.result({"index": str(path / INDEX)}, lambda: console.line(str(path / INDEX)))


@command
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


@command
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
