"""Scores of tasks, in the form in which the Hub shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from convert.hub.source import REPOSITORY

__all__ = ["eval_results"]


def eval_results(task: Mapping[str, Any]) -> bytes | None:
    """The file of ``.eval_results`` with which the Hub shows the score of a task.

    Args:
        task: A ``TaskScores`` in plain types; its first metric is the score.

    Returns:
        The file; None if its dataset is not on the Hub, or only a part of it was asked.
    """
    if task["limit"] is not None or not REPOSITORY.fullmatch(task["dataset"]):
        return None
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml  # noqa: PLC0415

    metric = task["metrics"][0]
    how = [f"lm-evaluation-harness {task['harness']}", f"{task['fewshot']}-shot", metric["name"]]
    entry = EvalResultEntry(
        dataset_id=task["dataset"],
        task_id=task["subset"] or task["task"],
        value=metric["mean"]["value"],
        notes=", ".join([*how, task["dtype"]]),
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False).encode()
