"""What a report says in tables and lists, as words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from convert.reporting.conversions import Conversion, LatentConversion, MergedConversion
from convert.reporting.measured import Evaluation
from convert.reporting.rows import Row, pareto_rows
from convert.reporting.runs import Run
from convert.tables import Table, retrieval_heading, retrieval_tables, task_table
from kvpatch.memory import format_bytes

__all__ = [
    "evaluation_table",
    "probes",
    "provenance",
    "recipe_text",
    "source_facts",
    "source_files",
    "task_tables",
    "training_table",
    "variant_table",
]

_NONE = "\u2013"
_SETTING = ("text", "text_sha256", "windows", "context", "stride", "dtype")


def source_facts(conversions: Sequence[Conversion]) -> list[tuple[str, str]]:
    """What is known of the source of these conversions, by what it is."""
    source = conversions[0].source
    facts = [
        ("repository", source.repository),
        ("commit", source.revision),
        ("class", source.architecture),
        ("KV cache per token", format_bytes(conversions[0].kv_cache.bytes_per_token[0])),
    ]
    return [(name, value) for name, value in facts if value is not None]


def source_files(conversions: Sequence[Conversion]) -> list[tuple[str, str]]:
    """The weight files of the source, by name, with what they hash to."""
    files = conversions[0].source.files
    return [(name, f"sha256 {files[name].sha256}") for name in sorted(files)]


def variant_table(conversions: Sequence[MergedConversion | LatentConversion]) -> Table:
    """The source and each conversion: method, size, tokens of training and distance.

    Distances are those of the setting in which most conversions were measured.
    """
    rows = _main_rows(pareto_rows(conversions))
    measured = {row["model"]: row for row in rows if row["role"] == "conversion"}
    origin = next((row for row in rows if row["role"] == "source"), None)
    where = f", on {_setting(rows[0])}" if rows else ""
    full = conversions[0].kv_cache.bytes_per_token[0]
    source = [conversions[0].source.name, "the source", format_bytes(full), "100 %", _NONE]
    return Table(
        f"Source and conversions{where}",
        [
            "model",
            "method",
            "KV cache per token",
            "of the source's",
            "tokens trained",
            "KL, nats per token",
            "perplexity",
            "same top token",
            "Pareto front",
        ],
        [
            [*source, *_distances(origin)],
            *([*_sizes(one, full), *_distances(measured.get(one.name))] for one in conversions),
        ],
    )


def _sizes(conversion: MergedConversion | LatentConversion, full: int) -> list[str]:
    size = conversion.kv_cache.bytes_per_token[1]
    trained = sum(training.tokens for training in conversion.trainings)
    return [
        conversion.name,
        _method(conversion),
        format_bytes(size),
        f"{100 * size / full:.1f} %",
        f"{trained:,}" if trained else _NONE,
    ]


def _method(conversion: MergedConversion | LatentConversion) -> str:
    recipe = conversion.recipe
    parts = [conversion.kind]
    if isinstance(conversion, MergedConversion):
        parts.append(f"merge {conversion.recipe.merge}")
    if recipe.refit != "none":
        parts.append(f"refit {recipe.refit}")
    if conversion.calibration is not None:
        parts.append("calibrated")
    return ", ".join(parts)


def _main_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of the setting in which most models were measured, of the first of several such."""
    count = Counter(_key(row) for row in rows)
    return [row for row in rows if _key(row) == count.most_common(1)[0][0]]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in _SETTING)


def _setting(row: Row) -> str:
    return (
        f"{row['text']}: {row['windows']} windows of {row['context']} tokens, stride "
        f"{row['stride']}, {row['dtype']}"
    )


def _distances(row: Row | None) -> list[str]:
    if row is None:
        return [_NONE] * 4
    return [
        f"{row['kl']:z.4f}",
        f"{row['perplexity']:.3f}",
        f"{100 * row['top1']:.1f} %",
        "yes" if row["front"] else "no",
    ]


def training_table(runs: Sequence[Run]) -> Table:
    """What each run did, and its losses before and after on the text that was held out."""
    return Table(
        "Uptraining runs; losses in nats per token, before and after",
        [
            "model",
            "text",
            "teacher",
            "held-out text",
            "trained",
            "tokens",
            "steps",
            "KL to the teacher",
            "cross entropy",
        ],
        [_run_words(run) for run in runs],
    )


def _run_words(run: Run) -> list[str]:
    training = run.training
    recipe, held = training.recipe, training.eval_text
    adapters = "" if recipe.lora is None else f", adapters of rank {recipe.lora}"
    return [
        run.name,
        training.data.name,
        training.teacher or _NONE,
        _NONE if held is None else held.name,
        recipe.groups + adapters,
        f"{training.tokens:,}",
        f"{training.steps:,}",
        _change(run, "eval_kl") if training.teacher is not None else _NONE,
        _change(run, "eval_nll"),
    ]


def _change(run: Run, key: str) -> str:
    losses = [getattr(run.training.curve[end], key) for end in (0, -1)]
    if None in losses:
        return _NONE
    return " → ".join(f"{loss:.4f}" for loss in losses)


def evaluation_table(conversions: Sequence[Conversion]) -> Table:
    """All measurements on texts, of all conversions."""
    return Table(
        "Perplexity and distance from the source, by text",
        [
            "model",
            "text",
            "tokens scored",
            "perplexity",
            "of the source",
            "KL, nats per token",
            "same top token",
        ],
        [
            [conversion.name, *_evaluation_words(evaluation)]
            for conversion in conversions
            for evaluation in conversion.evaluations
        ],
    )


def _evaluation_words(evaluation: Evaluation) -> list[str]:
    against = evaluation.against
    scored = [f"{evaluation.tokens:,}", f"{evaluation.perplexity:.3f}"]
    compared = [_NONE] * 3
    if against is not None:
        agreed = f"{100 * against.top1:.1f} %"
        compared = [f"{against.perplexity:.3f}", f"{against.kl:z.4f}", agreed]
    return [_setting(evaluation.model_dump()), *scored, *compared]


def probes(conversions: Sequence[Conversion]) -> Iterator[tuple[str, str, list[Table]]]:
    """For each probe of retrieval the conversion, what came of it, and its tables."""
    for conversion in conversions:
        for probe in map(asdict, conversion.retrieval):
            yield conversion.name, retrieval_heading(probe), retrieval_tables(probe)


def task_tables(conversions: Sequence[Conversion]) -> Iterator[tuple[str, Table]]:
    """Scores of tasks, of each conversion that has some."""
    for conversion in conversions:
        if conversion.tasks:
            yield conversion.name, task_table([asdict(task) for task in conversion.tasks])


def provenance(conversion: Conversion) -> list[tuple[str, str]]:
    """Class, texts and versions of a conversion, by what they are."""
    facts = [("class", conversion.architecture), ("converted by", _versions(conversion.versions))]
    text = conversion.calibration
    if text is not None:
        windows = f"{text.samples} windows of {text.context} tokens of {text.text}"
        facts.append(("calibrated on", f"{windows} (sha256 {text.text_sha256})"))
    for training in conversion.trainings:
        data = training.data
        which = "streamed" if data.sha256 is None else f"sha256 {data.sha256}"
        what = f"{training.tokens:,} tokens of {data.name} ({which})"
        facts.append(("trained on", f"{what}, by {_versions(training.versions)}"))
    return facts


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def recipe_text(conversion: Conversion) -> str:
    """The recipe as YAML."""
    return yaml.safe_dump(conversion.recipe.model_dump(), sort_keys=True, allow_unicode=True)
