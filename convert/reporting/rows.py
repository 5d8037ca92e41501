"""The numbers behind the plots, as rows of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convert.reporting.conversions import Conversion, LatentConversion, MergedConversion
from convert.reporting.measured import Evaluation
from convert.reporting.runs import Run

__all__ = [
    "Row",
    "latent_rows",
    "lost_energy_rows",
    "pareto_front",
    "pareto_rows",
    "similarity_rows",
    "training_rows",
]

Row = Mapping[str, Any]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, loss) points no other one beats in one number while matching it in the other."""
    return [
        not any(x <= cost and y <= loss and (x, y) != (cost, loss) for x, y in points)
        for cost, loss in points
    ]


def pareto_rows(conversions: Sequence[Conversion]) -> list[Row]:
    """Cache size and KL of every measurement against the source, and the source itself at KL 0.

    Rows that were measured alike follow one another, the source first; ``front`` marks those that
    nothing in the same setting beats. KL is in nats per token.
    """
    measured: dict[tuple[Any, ...], list[tuple[Conversion, Evaluation]]] = {}
    for conversion in conversions:
        for evaluation in conversion.evaluations:
            if evaluation.against is not None:
                measured.setdefault(evaluation.setting, []).append((conversion, evaluation))
    return [row for group in measured.values() for row in _setting_rows(group)]


def _setting_rows(group: Sequence[tuple[Conversion, Evaluation]]) -> list[Row]:
    rows = [_source_row(*group[0])] + [_measured_row(*pair) for pair in group]
    front = pareto_front([(row["kv_bytes_per_token"], row["kl"]) for row in rows])
    return [{**row, "front": best} for row, best in zip(rows, front, strict=True)]


def _source_row(conversion: Conversion, evaluation: Evaluation) -> Row:
    assert evaluation.against is not None
    perplexity = evaluation.against.perplexity
    size = conversion.kv_cache.bytes_per_token[0]
    return _row(conversion.source.name, "source", size, evaluation, (0.0, perplexity, 1.0))


def _measured_row(conversion: Conversion, evaluation: Evaluation) -> Row:
    found = evaluation.against
    assert found is not None
    size = conversion.kv_cache.bytes_per_token[1]
    numbers = (found.kl, evaluation.perplexity, found.top1)
    return _row(conversion.name, "conversion", size, evaluation, numbers)


def _row(
    name: str, role: str, size: int, evaluation: Evaluation, numbers: tuple[float, float, float]
) -> Row:
    kl, perplexity, top1 = numbers
    return {
        "model": name,
        "role": role,
        "kv_bytes_per_token": size,
        "kl": kl,
        "perplexity": perplexity,
        "top1": top1,
        "text": evaluation.text,
        "text_sha256": evaluation.text_sha256,
        "windows": evaluation.windows,
        "context": evaluation.context,
        "stride": evaluation.stride,
        "dtype": evaluation.dtype,
        "tokens": evaluation.tokens,
    }


def lost_energy_rows(conversion: MergedConversion) -> list[Row]:
    """One row for each layer and head: its lost shares, then those and the measures of its layer.

    The lost energy is predicted by the merge; ``attention_kl`` (nats) and ``output_error`` (share
    of the output's power) were measured while calibrating, and are None elsewhere.
    """
    return [
        {
            "layer": layer.layer,
            "source": layer.source,
            "head": head,
            "lost_k": keys,
            "lost_v": values,
            "layer_lost_k": layer.lost_energy_k,
            "layer_lost_v": layer.lost_energy_v,
            "layer_attention_kl": layer.attention_kl,
            "layer_output_error": layer.output_error,
        }
        for layer in conversion.layers
        for head, (keys, values) in enumerate(
            zip(layer.lost_heads_k, layer.lost_heads_v, strict=True)
        )
    ]


def latent_rows(conversion: LatentConversion) -> list[Row]:
    """One row for each layer: sizes, what it lost, and what was measured while calibrating.

    ``lost_rope``, ``lost_latent`` and ``lost_shared`` are predicted, before any refit.
    """
    return [
        {
            "layer": layer.layer,
            "source": layer.source,
            "rank": layer.rank,
            "rope_dims": layer.rope_dims,
            "lost_rope": layer.lost_energy_rope,
            "lost_latent": layer.lost_energy_latent,
            "lost_shared": layer.lost_energy_shared,
            "attention_kl": layer.attention_kl,
            "output_error": layer.output_error,
        }
        for layer in conversion.layers
    ]


def similarity_rows(conversion: Conversion) -> list[Row]:
    """One row for each two layers; ``shared`` where the second reads the keys of the first."""
    return [
        {
            "owner": owner,
            "layer": layer.layer,
            "similarity": share,
            "shared": layer.source == owner != layer.layer,
        }
        for owner, shares in enumerate(conversion.similarity or [])
        for layer, share in zip(conversion.layers, shares, strict=True)
    ]


def training_rows(runs: Sequence[Run]) -> list[Row]:
    """One row for each point of each run; losses in nats per token.

    ``tokens`` counts from the conversion on, those of earlier runs included. ``kl`` and ``ce`` are
    means over the training tokens since the point before, ``held_out_*`` those of the other text.
    """
    return [
        {
            "run": run.name,
            "data": run.training.data.name,
            "held_out": held.name if (held := run.training.eval_text) else None,
            "held_out_sha256": held.sha256 if held else None,
            "samples": run.training.recipe.eval_samples,
            "context": run.training.recipe.context,
            "tokens": run.before + point.tokens,
            "kl": point.kl,
            "ce": point.ce,
            "held_out_kl": point.eval_kl,
            "held_out_ce": point.eval_nll,
        }
        for run in runs
        for point in run.training.curve
    ]
