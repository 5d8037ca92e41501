"""The plan of an uptraining run, as data and for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.console import Console
from convert.training.groups import rate_factor
from convert.training.run import Prepared
from kvpatch.memory import format_bytes

__all__ = ["plan_data", "print_plan"]


def plan_data(prepared: Prepared) -> dict[str, Any]:
    """What would be done, in plain types."""
    recipe = prepared.recipe
    return {
        "model": prepared.source.name,
        "teacher": None if prepared.teacher is None else prepared.teacher.name,
        "parameters": prepared.parameters,
        "detour": None if prepared.detour is None else prepared.detour.architecture,
        "tokens": recipe.tokens,
        "tokens_per_step": recipe.batch * recipe.grad_accumulation * (recipe.context or 0),
        "steps": prepared.steps,
        "groups": recipe.groups,
        "lora": recipe.lora,
        "lr": recipe.lr * rate_factor(prepared.checkpoint.config),
        "peak_ram": prepared.peak_ram,
        "checkpoint_bytes": prepared.checkpoint_bytes,
    }


def print_plan(data: Mapping[str, Any], console: Console) -> None:
    """The plan as a table."""
    adapters = "" if data["lora"] is None else f", adapters of rank {data['lora']}"
    console.table(
        "",
        ["uptraining", ""],
        [
            ("model", f"{data['model']}, {data['parameters']:,} parameters"),
            ("teacher", data["teacher"] or "none"),
            ("trained", data["groups"] + adapters),
            *([("in the form of", data["detour"])] if data["detour"] else []),
            ("highest learning rate", f"{data['lr']:g}"),
            ("tokens", f"{data['tokens']:,}"),
            ("steps", f"{data['steps']:,} of {data['tokens_per_step']:,} tokens on one device"),
            ("memory at most", f"about {format_bytes(data['peak_ram'])} beside activations"),
            ("a checkpoint", f"{format_bytes(data['checkpoint_bytes'])} on disk, at most"),
        ],
        numeric=2,
    )
