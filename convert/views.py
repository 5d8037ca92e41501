"""Results as data for ``--json`` and as tables for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from convert.checkpoint.adapted import AdaptedCheckpoint
from convert.checkpoint.adapter_config import ADAPTER_CONFIG
from convert.console import Console
from convert.inspection import CacheRow
from convert.preparing import Prepared
from convert.recipe import MlaRecipe
from convert.tables import retrieval_heading, retrieval_tables, task_table
from convert.targets.serving import server_notes
from kvpatch.memory import format_bytes

__all__ = [
    "cache_data",
    "measured_data",
    "plan_data",
    "print_bench",
    "print_cache",
    "print_measured",
    "print_plan",
]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def cache_data(
    description: Mapping[str, Any], rows: Sequence[CacheRow], *, context: int, batch: int
) -> dict[str, Any]:
    """What ``inspect`` found, in plain types; the first row is the model as it is."""
    now = rows[0].cache.size(context, batch)
    return {
        "model": dict(description),
        "context": context,
        "batch": batch,
        "kv": [
            {
                "design": row.design,
                "command": row.command,
                "bytes_per_token": row.cache.bytes_per_token,
                "bytes": row.cache.size(context, batch),
                "share_of_now": row.cache.size(context, batch) / now,
            }
            for row in rows
        ],
    }


def print_cache(data: Mapping[str, Any], console: Console) -> None:
    """The model's attention, if there is a model, and the table of cache sizes."""
    if data["model"]:
        pairs = [(key, _word(value)) for key, value in data["model"].items() if value]
        console.table("", ["attention", ""], pairs, numeric=2)
        console.line("")
    console.table(
        f"KV cache for {data['batch']} x {data['context']:,} tokens",
        ["design", "command", "per token", "in all", "of now"],
        [
            (
                size["design"],
                size["command"] or "",
                format_bytes(size["bytes_per_token"]),
                format_bytes(size["bytes"]),
                f"{100 * size['share_of_now']:.1f} %",
            )
            for size in data["kv"]
        ],
        numeric=2,
    )


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_word(item)}" for key, item in value.items() if item)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def plan_data(prepared: Prepared) -> dict[str, Any]:
    """Everything the plan says, in plain types."""
    plan, facts, checkpoint = prepared.plan, prepared.plan.facts, prepared.checkpoint
    changed = checkpoint.changes if isinstance(checkpoint, AdaptedCheckpoint) else {}
    return {
        "source": prepared.source.name,
        "revision": prepared.source.revision,
        "output": prepared.recipe.output,
        "method": prepared.recipe.method,
        "merge": prepared.recipe.merge,
        "class": plan.target.architecture,
        "kv_heads": [
            facts.geometry.kv_heads if prepared.export is None else None,
            prepared.scheme.kv_heads,
        ],
        "latent": _latent(prepared),
        "kv_source_layers": list(plan.sources),
        "kv_bytes_per_token": [plan.before.bytes_per_token, plan.after.bytes_per_token],
        "kv_bytes_at_context": [plan.before.size(facts.context), plan.after.size(facts.context)],
        "context": facts.context,
        "bytes": [plan.source_bytes, plan.output_bytes],
        "parameters": plan.parameters,
        "adapter": _adapter(prepared),
        "peak_ram": plan.peak_ram,
        "files": {shard.file: sum(step.nbytes for step in shard.steps) for shard in plan.shards},
        "side_files": list(prepared.side_files),
        "tensors": [
            {
                "name": fate.name,
                "action": "merge"
                if fate.action == "copy" and fate.name in changed
                else fate.action,
                "before": list(fate.before),
                "after": list(fate.after) if fate.after is not None else None,
            }
            for fate in plan.fates(prepared.checkpoint.tensors)
        ],
        "added_tensors": _added(prepared),
    }


def _adapter(prepared: Prepared) -> dict[str, Any] | None:
    """The adapter of the source, and what is done with it; None if there is none."""
    checkpoint, base = prepared.checkpoint, prepared.source.base
    if isinstance(checkpoint, AdaptedCheckpoint):
        return {
            "action": "merge",
            "file": checkpoint.adapter.file,
            "rank": checkpoint.adapter.config["r"],
            "tensors": len(checkpoint.changes),
            "base": None if base is None else base.name,
        }
    if not (prepared.source.path / ADAPTER_CONFIG).exists():
        return None
    return {"action": "ignore", "file": None, "rank": None, "tensors": 0, "base": None}


def _added(prepared: Prepared) -> list[dict[str, Any]]:
    """Tensors of the result under names that the source does not have."""
    return [
        {"name": spec.name, "shape": list(spec.shape)}
        for shard in prepared.plan.shards
        for spec in shard.tensors
        if spec.name not in prepared.checkpoint.tensors
    ]


def _latent(prepared: Prepared) -> dict[str, Any] | None:
    """Sizes of the latents of a result, what of them is open, and which servers load it."""
    sizes = prepared.scheme.latent
    if sizes is None:
        return None
    target = prepared.plan.target
    notes = {}
    if target.name == "native":
        notes = server_notes(target.edit(prepared.checkpoint.config))
    return {**sizes, **_open(prepared), "servers": notes}


def _open(prepared: Prepared) -> dict[str, Any]:
    """What a run chooses by what it would lose, where the plan shows the largest that is possible.

    The splits of a budget, each rank and rotary dims, and whether each layer gets its own.
    """
    splits, recipe = prepared.scheme.splits, prepared.recipe
    per_layer = isinstance(recipe, MlaRecipe) and recipe.per_layer
    if len(splits) < 2 and not (splits and per_layer):
        return {}
    return {"splits": [[own.rank, own.rope_dims] for own in splits], "per_layer": per_layer}


def print_plan(data: Mapping[str, Any], console: Console) -> None:
    """The plan in tables; unless verbose, tensors that differ only in their layer share a line."""
    heads, token, full = data["kv_heads"], data["kv_bytes_per_token"], data["kv_bytes_at_context"]
    latent = data["latent"]
    merge = f"merge {data['merge']}, " if data["merge"] else ""
    console.table(
        f"{data['source']} -> {data['output'] or 'no output'}: {data['method']}, "
        f"{merge}{data['class']}",
        ["", "before", "after"],
        [
            ("KV heads per layer", str(heads[0]), str(heads[1]))
            if latent is None
            else (
                "cached in a layer",
                _sizes(latent) if heads[0] is None else f"{heads[0]} KV heads",
                _sizes(latent),
            ),
            ("KV cache per token", format_bytes(token[0]), format_bytes(token[1])),
            (
                f"KV cache of {data['context']:,} tokens",
                format_bytes(full[0]),
                format_bytes(full[1]),
            ),
            ("weights", format_bytes(data["bytes"][0]), format_bytes(data["bytes"][1])),
        ],
    )
    console.line("")
    console.table(
        "",
        ["tensors", "action", "count", "before", "after"],
        _tensor_rows(data, console.verbose),
        numeric=2,
    )
    console.line("")
    if latent is not None and "splits" in latent:
        console.line(_choice(latent))
    sources = data["kv_source_layers"]
    if len(set(sources)) < len(sources):
        console.line(f"layers that share: {_groups(sources)}")
    for note in latent["servers"].values() if latent is not None else ():
        console.line(note)
    files = data["files"]
    count = f"{len(files)} weight files" if len(files) > 1 else "1 weight file"
    console.line(f"{count}, {format_bytes(sum(files.values()))}")
    console.line(f"side files copied: {', '.join(data['side_files']) or 'none'}")
    if (adapter := data["adapter"]) is not None:
        of = f" of {adapter['base']}" if adapter["base"] else ""
        console.line(
            f"adapter: {adapter['file']}, LoRA of rank {adapter['rank']}{of}, merged into "
            f"{adapter['tensors']} tensors"
            if adapter["action"] == "merge"
            else f"adapter: left out ({ADAPTER_CONFIG})"
        )
    console.line(f"peak memory: {format_bytes(data['peak_ram'])}")


def _sizes(latent: Mapping[str, Any]) -> str:
    scales = f", scales of keys {latent['key_scales']}" if "key_scales" in latent else ""
    if isinstance(latent["rank"], int):
        return f"latent of {latent['rank']}, rotary key of {latent['rope_dims']}{scales}"
    each = (f"{own}+{rope}" for own, rope in zip(latent["rank"], latent["rope_dims"], strict=True))
    return f"latent and rotary key of each layer: {', '.join(each)}{scales}"


def _choice(latent: Mapping[str, Any]) -> str:
    if latent["per_layer"]:
        return "open until it runs: sizes of each layer, by what it loses; shown are equal ones"
    splits = ", ".join(f"{rank}+{rope}" for rank, rope in latent["splits"])
    return f"open until it runs: which split loses least, {splits}; shown is the last, the largest"


def _tensor_rows(data: Mapping[str, Any], each: bool) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, ...], int] = {}
    for tensor in data["tensors"]:
        after = "" if tensor["after"] is None else _shape(tensor["after"])
        pattern = tensor["name"] if each else _NUMBER.sub("*", tensor["name"])
        key = (pattern, tensor["action"], _shape(tensor["before"]), after)
        groups[key] = groups.get(key, 0) + 1
    for tensor in data["added_tensors"]:
        pattern = tensor["name"] if each else _NUMBER.sub("*", tensor["name"])
        key = (pattern, "add", "", _shape(tensor["shape"]))
        groups[key] = groups.get(key, 0) + 1
    return [(key[0], key[1], str(count), *key[2:]) for key, count in groups.items()]


def _groups(sources: Sequence[int]) -> str:
    """Layers with one set of keys and values, ``0-1, 2, 3-5``."""
    ends = [start for start, source in enumerate(sources) if source == start] + [len(sources)]
    return ", ".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in pairwise(ends))


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def print_bench(data: Mapping[str, Any], console: Console) -> None:
    """Speeds and sizes for people; ratios are to the first run."""
    first = data["runs"][0]

    def rate(run: Mapping[str, Any], key: str) -> str:
        return f"{run[key]:,.1f} ({run[key] / first[key]:.2f}x)"

    console.line(
        f"{data['batch']} x {data['prompt']:,} tokens of prompt, {data['new']:,} new; "
        f"{data['dtype']} on {data['device']}"
    )
    rows = [
        (
            run["model"],
            run["attention"],
            rate(run, "prefill_tokens_per_second"),
            rate(run, "decode_tokens_per_second"),
            format_bytes(run["cache_bytes"]),
            "" if run["peak_bytes"] is None else format_bytes(run["peak_bytes"]),
        )
        for run in data["runs"]
    ]
    columns = ["model", "attention", "prefill tok/s", "decode tok/s", "KV cache", "peak"]
    console.table("", columns, rows, numeric=2)
    for run in data["runs"]:
        if run["detail"] is not None:
            console.line(f"{run['model']}: {run['detail'].splitlines()[0]}")


def measured_data(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What ``eval`` measured, in plain types: on the text at the top, the rest under its name."""
    data: dict[str, Any] = {}
    for evaluation in measured.get("evaluations", []):
        data |= evaluation
    for probe in measured.get("retrieval", []):
        data["retrieval"] = probe
    if "tasks" in measured:
        data["tasks"] = list(measured["tasks"])
    return data


def print_measured(measured: Mapping[str, Sequence[Mapping[str, Any]]], console: Console) -> None:
    """What ``eval`` measured, for people."""
    for evaluation in measured.get("evaluations", []):
        _print_evaluation(evaluation, console)
    for probe in measured.get("retrieval", []):
        _print_retrieval(probe, console)
    if "tasks" in measured:
        table = task_table(measured["tasks"])
        console.table(table.title, table.columns, table.rows, numeric=2)


def _print_retrieval(data: Mapping[str, Any], console: Console) -> None:
    console.line(retrieval_heading(data))
    for table in retrieval_tables(data):
        console.line("")
        console.table(table.title, table.columns, table.rows)


def _print_evaluation(data: Mapping[str, Any], console: Console) -> None:
    console.line(
        f"{data['text']}: {data['windows']} windows of {data['context']} tokens, "
        f"stride {data['stride']}, {data['tokens']:,} tokens scored, {data['dtype']}"
    )
    against = data["against"]
    rows = [("perplexity", f"{data['perplexity']:.3f}")]
    if against is not None:
        rows += [
            ("perplexity of the source", f"{against['perplexity']:.3f}"),
            ("mean KL to the source", f"{against['kl']:.4f} nats"),
            ("same top token", f"{100 * against['top1']:.1f} %"),
        ]
    console.table("", ["measure", "value"], rows)
