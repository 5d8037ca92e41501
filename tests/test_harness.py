"""Tasks of lm-evaluation-harness: the package itself on a local task, and what is made of it."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub._eval_results import parse_eval_result_entries
from typer.testing import CliRunner

from convert.cli import app
from convert.loading import load_tokenizer
from convert.pipeline import convert
from convert.recipe import make_recipe
from convert.results import save_results
from tests.helpers import load_folder

PLACES = ("kitchen", "barn", "forest", "garden", "river", "house")
PEOPLE = ("Petra", "Oren", "Mia", "Lena")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments), "-q"])


@pytest.fixture(scope="module")
def mqa(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "mqa"
    return convert(make_recipe({"method": "mqa", "source": str(demo_model), "output": str(out)}))


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return [
        {
            "question": f"{person} is in the {place} with a brown hat. Where is {person}? In the",
            "choices": [place, PLACES[(i + 1) % len(PLACES)]],
            "answer": 0,
        }
        for person in PEOPLE
        for i, place in enumerate(PLACES)
    ]


@pytest.fixture(scope="module")
def tasks(questions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is the extra eval, not of dev")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "where.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "where_is",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "where.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": kind, "higher_is_better": higher}
            for metric, kind, higher in (("acc", "mean", True), ("mcc", "matthews_corrcoef", True))
        ],
        "metadata": {"version": 3},
    }
    (folder / "where.yaml").write_text(yaml.safe_dump(task))
    broken = {**task, "task": "from_the_hub", "dataset_path": "org/name", "dataset_kwargs": {}}
    (folder / "hub.yaml").write_text(yaml.safe_dump(broken))
    unsafe = {**task, "task": "unsafe", "unsafe_code": True}
    (folder / "unsafe.yaml").write_text(yaml.safe_dump(unsafe))
    return folder


@torch.no_grad()
def _right(folder: Path, questions: list[dict[str, Any]]) -> list[float]:
    """Whether the model finds the right choice likelier, question by question."""
    model, tokenizer, right = load_folder(folder), load_tokenizer(folder), []
    for item in questions:
        likely = []
        for choice in item["choices"]:
            ids = tokenizer(f"{item['question']} {choice}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(item["question"])["input_ids"])
            rows = model(ids).logits[0, :-1].log_softmax(-1)
            steps = range(start, ids.shape[1])
            likely.append(sum(float(rows[at - 1, ids[0, at]]) for at in steps))
        right.append(float(likely.index(max(likely)) == item["answer"]))
    return right


@pytest.mark.filterwarnings("ignore")  # the harness and its libraries are not ours to mend
def test_scores_are_paired_question_by_question(
    demo_model: Path, mqa: Path, questions: list[dict[str, Any]], tasks: Path
) -> None:
    result = run(
        *("eval", mqa, "--tasks", "where_is", "--include-path", tasks, "--against", demo_model),
        *("--save", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    (score,) = json.loads(result.stdout)["tasks"]
    ours, theirs = _right(mqa, questions), _right(demo_model, questions)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert any(differences)
    accuracy, correlation = score["metrics"]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    assert accuracy["mean"]["value"] == pytest.approx(statistics.fmean(ours))
    assert accuracy["mean"]["source"] == pytest.approx(statistics.fmean(theirs))
    assert accuracy["mean"]["difference"] == pytest.approx(statistics.fmean(differences))
    assert accuracy["mean"]["difference_error"] == pytest.approx(error)
    assert accuracy["higher_is_better"] is True
    assert correlation["name"] == "mcc"  # no mean over questions, and so without errors
    assert correlation["mean"]["error"] is correlation["mean"]["difference_error"] is None
    assert (score["version"], score["samples"], score["fewshot"]) == ("3", 24, 0)
    assert json.loads((mqa / "kvpatch.json").read_text())["tasks"] == [score]
    assert "| where_is | acc | 0 | 24 |" in (mqa / "README.md").read_text()
    assert not (mqa / ".eval_results").exists()  # its data is not on the Hub
    assert run("verify", mqa, "--files-only").exit_code == 0


@pytest.mark.filterwarnings("ignore")
def test_limit_and_examples_reach_the_harness(demo_model: Path, tasks: Path) -> None:
    more = ("--limit", "2", "--num-fewshot", "1", "--include-path", tasks, "--json")
    result = run("eval", demo_model, "--tasks", "where_is", *more)
    assert result.exit_code == 0, result.stderr
    (score,) = json.loads(result.stdout)["tasks"]
    assert (score["samples"], score["fewshot"], score["limit"]) == (2, 1, 2)
    assert score["metrics"][0]["mean"]["source"] is None


@pytest.mark.filterwarnings("ignore")
def test_tasks_that_cannot_be_run_are_refused(demo_model: Path, tasks: Path) -> None:
    def refused(name: str) -> Any:
        return run("eval", demo_model, "--tasks", name, "--include-path", tasks)

    unknown = refused("where_iss")
    assert unknown.exit_code == 2
    assert "has no task 'where_iss'" in unknown.stderr
    assert "Did you mean where_is" in unknown.stderr
    offline = refused("from_the_hub")
    assert offline.exit_code == 5
    assert "cannot be downloaded" in offline.stderr
    unsafe = refused("unsafe")
    assert unsafe.exit_code == 2
    assert "runs code that the model writes" in unsafe.stderr


def test_a_missing_harness_is_named(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("eval", demo_model, "--tasks", "arc_easy")
    assert result.exit_code == 2
    assert "pip install 'kvpatch[eval]'" in result.stderr


def scores(**changed: Any) -> dict[str, Any]:
    """Of one task, as the harness module gives them."""
    mean = {"value": 0.5, "error": 0.01, "source": 0.6, "difference": -0.1}
    return {
        "task": "arc_easy",
        "version": "1.0",
        "harness": "0.4.13",
        "dataset": "allenai/ai2_arc",
        "subset": "ARC-Easy",
        "fewshot": 0,
        "limit": None,
        "samples": 2376,
        "dtype": "float32",
        "metrics": [
            {
                "name": "acc",
                "filter": "none",
                "higher_is_better": True,
                "mean": {**mean, "difference_error": 0.0125},
            }
        ],
        **changed,
    }


def test_scores_on_data_of_the_hub_reach_its_results(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mqa"
    convert(make_recipe({"method": "mqa", "source": str(demo_model), "output": str(out)}))
    save_results(out, {"tasks": [scores(), scores(task="part", limit=10)]})
    save_results(out, {"tasks": [scores()]})  # replaces itself
    assert [file.name for file in (out / ".eval_results").iterdir()] == ["arc_easy.yaml"]
    content = yaml.safe_load((out / ".eval_results/arc_easy.yaml").read_text())
    (entry,) = parse_eval_result_entries(content)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/ai2_arc", "ARC-Easy", 0.5)
    assert entry.notes == "lm-evaluation-harness 0.4.13, 0-shot, acc, float32"
    card = (out / "README.md").read_text()
    row = "| arc_easy | acc | 0 | 2376 | 0.5000 ± 0.0100 | 0.6000 | -0.1000 ± 0.0125 |"
    assert card.count(row) == 1
    manifest = json.loads((out / "kvpatch.json").read_text())
    assert ".eval_results/arc_easy.yaml" in manifest["files"]
    assert [task["task"] for task in manifest["tasks"]] == ["part", "arc_easy"]
    assert run("verify", out, "--files-only").exit_code == 0
