"""Tasks of lm-evaluation-harness, on a model and its source, paired sample by sample."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.loading import Pair, quiet_transformers
from convert.paired import Mean, paired_mean
from kvpatch.errors import NetworkError, UsageError, VerificationError

__all__ = ["Metric", "TaskScores", "check_harness", "run_tasks"]

_FEWSHOT_SEED = 1234  # the harness's own default


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric of a task.

    Args:
        name: As the harness calls it.
        filter: What it made of the answers first; ``none`` for most tasks.
        higher_is_better: None where the task does not say.
        mean: Its value; without errors where it is no mean over samples, as BLEU is none.
    """

    name: str
    filter: str
    higher_is_better: bool | None
    mean: Mean


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """The scores of one task and everything that is needed to repeat them.

    Args:
        task: Name in the harness.
        version: Of the task.
        harness: Version of the harness.
        dataset: Repository on the Hub, or how the data is loaded.
        subset: Its configuration, if it has several.
        fewshot: Solved examples before each question.
        limit: Most questions that were to be asked; None for all.
        samples: Questions that were asked.
        dtype: Dtype in which the models ran.
        metrics: In the order of the task.
    """

    task: str
    version: str
    harness: str
    dataset: str
    subset: str | None
    fewshot: int
    limit: int | None
    samples: int
    dtype: str
    metrics: list[Metric]


def check_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        import lm_eval  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(
            "--tasks needs lm-evaluation-harness", hint="pip install 'kvpatch[eval]'"
        ) from error


def run_tasks(
    pair: Pair,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    batch: int = 8,
) -> list[TaskScores]:
    """Run tasks on a model, and on its source if there is one.

    Args:
        pair: Model and source.
        names: Tasks, groups or tags of the harness.
        limit: Ask only the first questions of each task.
        num_fewshot: Solved examples before each question; the task's own number if not given.
        include_path: Folder with more tasks.
        batch: Requests in one forward pass.

    Raises:
        UsageError: If the harness is not installed, or has no such task, or the task runs code
            that a model wrote.
        NetworkError: If data of a task must be downloaded and cannot be.
        VerificationError: If model and source were not asked the same.
    """
    check_harness()
    with quiet_transformers(), _quiet_harness():
        loaded = _load(names, include_path)
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UsageError(f"task {name} runs code that the model writes; it is not run here")
            own = task.get_config("num_fewshot")
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
        runs = [
            _run(model, pair.tokenizer, loaded, limit, batch)
            for model in (pair.model, pair.source)
            if model is not None
        ]
    dtype = str(pair.model.dtype).removeprefix("torch.")
    return [_scores(name, task, runs, limit, dtype) for name, task in loaded["tasks"].items()]


@contextmanager
def _quiet_harness() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(names: Sequence[str], include_path: Path | None) -> Any:
    """The tasks with their data, as the harness's evaluation takes them."""
    from datasets.exceptions import DatasetNotFoundError  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path} is no folder")
    manager = TaskManager(include_path=include_path)
    known = manager.all_tasks
    for name in names:
        if name not in known:
            close = get_close_matches(name, known)
            raise UsageError(
                f"lm-evaluation-harness {version('lm_eval')} has no task {name!r}",
                hint=f"Did you mean {' or '.join(close)}?"
                if close
                else "`lm-eval ls tasks` lists them; --include-path adds a folder of your own.",
            )
    try:
        return manager.load(list(names))
    except DatasetNotFoundError as error:
        raise _unreachable(names, error) from error
    except FileNotFoundError as error:
        raise UsageError(f"data of {', '.join(names)}: {error}") from error
    except OSError as error:  # of every network client, and ConnectionError when offline
        raise _unreachable(names, error) from error


def _unreachable(names: Sequence[str], error: Exception) -> NetworkError:
    return NetworkError(
        f"data of {', '.join(names)} cannot be downloaded: {error}",
        hint="Check the network and HF_HUB_OFFLINE; data that was downloaded once is kept.",
    )


def _run(model: Any, tokenizer: Any, loaded: Any, limit: int | None, batch: int) -> Any:
    from lm_eval import evaluator  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # both models see the same examples
    return evaluator.evaluate(
        lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )


def _scores(
    name: str, task: Any, runs: Sequence[Mapping[str, Any]], limit: int | None, dtype: str
) -> TaskScores:
    asked = [
        [(sample["doc_id"], sample["filter"], sample["prompt_hash"]) for sample in found]
        for found in (run["samples"][name] for run in runs)
    ]
    if any(other != asked[0] for other in asked):
        raise VerificationError(f"task {name} did not ask model and source the same questions")
    higher = task.higher_is_better()
    return TaskScores(
        task=name,
        version=str(runs[0]["versions"][name]),
        harness=version("lm_eval"),
        dataset=str(task.config.dataset_path),
        subset=task.config.dataset_name,
        fewshot=runs[0]["n-shot"][name],
        limit=limit,
        samples=runs[0]["n-samples"][name]["effective"],
        dtype=dtype,
        metrics=[
            Metric(
                name=metric,
                filter=kind,
                higher_is_better=higher.get(metric),
                mean=_mean(name, metric, kind, task, runs),
            )
            for metric, kind in _metrics(runs[0]["results"][name])
        ],
    )


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Metrics and filters among the keys of a result, ``acc,none`` but not its ``_stderr``."""
    for key in results:
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, kind


def _mean(name: str, metric: str, kind: str, task: Any, runs: Sequence[Mapping[str, Any]]) -> Mean:
    from lm_eval.api.metrics import mean  # noqa: PLC0415

    values, *source = [float(run["results"][name][f"{metric},{kind}"]) for run in runs]
    if task.aggregation()[metric] is not mean:
        difference = values - source[0] if source else None
        return Mean(values, None, source[0] if source else None, difference)
    ours, *theirs = [
        [float(sample[metric]) for sample in run["samples"][name] if sample["filter"] == kind]
        for run in runs
    ]
    return paired_mean(ours, theirs[0] if theirs else None)
