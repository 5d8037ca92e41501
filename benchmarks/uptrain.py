"""What uptraining wins back, from plain and from calibrated starts, on a real checkpoint.

    python -m benchmarks.uptrain --data ../shared/data --work /tmp/uptrain

Every run distils the source into a converted model on the training text and measures both on
windows of the validation text. A row that is in the result is not run again, and a run that was
interrupted goes on from its checkpoint in ``--work``. ``--search`` runs short ones at several
learning rates instead and prints what they reach.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment, write_result

MODEL = "classics-mha-6m"
TOKENS = 300_000
CONTEXT, BATCH = 256, 2
SAMPLES, HELD = 96, 32
POINTS = 16
_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
_CALIBRATED: Mapping[str, Any] = {"samples": SAMPLES, "context": CONTEXT}
_MQA: Mapping[str, Any] = {"method": "mqa"}
_CLA: Mapping[str, Any] = {"method": "cla", "share": 2, "kv_heads": 4}
_DISTILL: Mapping[str, Any] = {"hidden_mse": 100.0, "first_phase": 0.5}
_MLA: Mapping[str, Any] = {"method": "mla", "rank": 32, "rope_dims": 32, "target": "kvpatch"}


@dataclass(frozen=True, slots=True)
class Run:
    """One line of the plot.

    Args:
        what: Conversion.
        start: How its weights were made.
        lr: Highest learning rate, chosen by ``--search``; 1.5 times that where layers share.
        recipe: Keys of the conversion; none for the source itself.
        tokens: To train on.
        keys: More keys of the training.
        random_kv: Replace keys and values by random ones.
    """

    what: str
    start: str
    lr: float
    recipe: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = TOKENS
    keys: Mapping[str, Any] = field(default_factory=lambda: _DISTILL)
    random_kv: bool = False

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"{self.what}, {self.start}"


_SVD = {"merge": "svd", **_CALIBRATED}
RUNS = (
    Run("MQA", "mean", 1e-3, {**_MQA, "merge": "mean"}),
    Run("MQA", "calibrated", 3e-4, {**_MQA, **_SVD}),
    Run("MQA", "calibrated, a quarter of the tokens", 3e-4, {**_MQA, **_SVD}, TOKENS // 4),
    Run("MQA", "random keys and values", 1e-3, {**_MQA, "merge": "mean"}, random_kv=True),
    Run("CLA2 + GQA-4", "mean", 1e-3, {**_CLA, "merge": "mean"}),
    Run("CLA2 + GQA-4", "calibrated", 2e-4, {**_CLA, **_SVD}),
    Run("CLA2 + GQA-4", "calibrated, a quarter of the tokens", 2e-4, {**_CLA, **_SVD}, TOKENS // 4),
    Run("MLA 12.5 %", "plain", 3e-4, dict(_MLA)),
    Run("MLA 12.5 %", "calibrated", 3e-4, {**_MLA, **_CALIBRATED}),
    Run(
        "MLA 12.5 %",
        "calibrated, a quarter of the tokens",
        1e-4,
        {**_MLA, **_CALIBRATED},
        TOKENS // 4,
    ),
    Run("source", "unconverted", 3e-5, keys={"kl": 0.0, "ce": 1.0}),
)


def main() -> None:
    """Train, write ``results/uptrain.json`` and its plot, and print a line for each run."""
    arguments = _arguments()
    runs = [run for run in RUNS if not arguments.only or run.name in arguments.only]
    if arguments.search:
        _search(runs, arguments)
        return
    path = RESULTS / "uptrain.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    for run in runs:
        if not any(_same(row, run) for row in rows):
            row = {**_train(run, arguments), "commit": environment()["commit"]["hash"]}
            rows = [old for old in rows if old["name"] != run.name] + [row]
            write_result("uptrain", {**environment(), "conditions": _conditions(), "rows": rows})
        row = next(row for row in rows if row["name"] == run.name)
        sys.stderr.write(_line(row) + "\n")
    _plot(rows, RESULTS / "uptrain.png")
    for line in _verdicts(rows):
        sys.stdout.write(line + "\n")


def _same(row: Mapping[str, Any], run: Run) -> bool:
    return (row["name"], row["lr"], row["tokens_wanted"]) == (run.name, run.lr, run.tokens)


def _conditions() -> dict[str, str]:
    return {
        "training": f"batches of {BATCH} x {CONTEXT} tokens of the training text, shuffled, AdamW, "
        "cosine; KL to the source, and in the first half the error of hidden states, weighted 100",
        "source": "its control is trained on the text alone, by cross entropy",
        "measured": f"on {HELD} windows of {CONTEXT} tokens of the validation text, the first ones",
        "calibration": f"{SAMPLES} windows of {CONTEXT} tokens of the training text, seed 0",
        "seconds": "of processor time, measurements included",
    }


def _search(runs: list[Run], arguments: argparse.Namespace) -> None:
    for run in runs:
        for lr in arguments.rates:
            short = Run(
                run.what, run.start, lr, run.recipe, arguments.tokens, run.keys, run.random_kv
            )
            sys.stdout.write(f"lr {lr:g}: {_line(_train(short, arguments, points=2))}\n")
            sys.stdout.flush()


def _train(run: Run, arguments: argparse.Namespace, points: int = POINTS) -> dict[str, Any]:
    import torch

    from convert.loading import load_model, load_tokenizer
    from convert.training.loop import Training, make_accelerator
    from convert.training.recipe import UptrainRecipe

    data, work = arguments.data, arguments.work / f"{run.name}-{run.lr:g}-{run.tokens}"
    source = data / "models" / MODEL
    start = _start(run, source, data, arguments.work)
    recipe = UptrainRecipe.model_validate(
        {
            "source": str(start),
            "teacher": str(source),
            "data": str(data / "text" / "classics_train_4mb.txt"),
            "eval_text": str(data / "text" / "classics_valid.txt"),
            "eval_samples": HELD,
            "tokens": run.tokens,
            "eval_every": run.tokens // points,
            "checkpoint_every": run.tokens // points,
            "batch": BATCH,
            "context": CONTEXT,
            "lr": run.lr,
            "device": "cpu",
            **run.keys,
        }
    )
    student = load_model(start, dtype=torch.float32)
    if run.random_kv:
        _randomise(student)
    before, began = time.process_time(), time.perf_counter()
    with make_accelerator(recipe) as accelerator:
        training = Training(
            recipe,
            accelerator,
            student=student,
            teacher=load_model(source, dtype=torch.float32),
            tokenizer=load_tokenizer(source),
            folder=work,
            note=lambda text: sys.stderr.write(f"  {run.name}: {text}\n"),
        )
        outcome = training.run()
    shutil.rmtree(work)
    return {
        "name": run.name,
        "what": run.what,
        "start": run.start,
        "lr": run.lr,
        "tokens_wanted": run.tokens,
        "tokens": outcome.tokens,
        "cpu_seconds": time.process_time() - before,
        "seconds": time.perf_counter() - began,
        "curve": outcome.curve,
    }


def _start(run: Run, source: Path, data: Path, work: Path) -> Path:
    """The converted model, made once."""
    from convert import convert, make_recipe

    if not run.recipe:
        return source
    kind = "calibrated" if "samples" in run.recipe else "plain"
    out = work / f"{run.what}-{kind}"
    if not out.exists():
        text = {"calibration": str(data / "text" / "classics_train_4mb.txt")}
        more = text if "samples" in run.recipe else {}
        convert(make_recipe({"source": str(source), "output": str(out), **run.recipe, **more}))
    return out


def _randomise(student: Any) -> None:
    """Keys and values as a new model would have them, drawn with a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, weight in student.named_parameters():
        if "k_proj" in name or "v_proj" in name:
            weight.data.normal_(0, student.config.initializer_range, generator=generator)


def _line(row: Mapping[str, Any]) -> str:
    first, last = row["curve"][0], row["curve"][-1]
    return (
        f"{row['name']:50s} {last['tokens']:>8,} tokens: loss {first['eval_nll']:.4f} -> "
        f"{last['eval_nll']:.4f}, KL {first['eval_kl']:.4f} -> {last['eval_kl']:.4f}, "
        f"{row['cpu_seconds'] / last['tokens'] * 1e4:.1f} s of CPU for 10k tokens"
    )


def _verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """How the starts compare, where both were run."""
    by_name = {row["name"]: row["curve"] for row in rows}
    lines = []
    for what, plain in (("MQA", "mean"), ("CLA2 + GQA-4", "mean"), ("MLA 12.5 %", "plain")):
        slow, fast = (by_name.get(f"{what}, {start}") for start in (plain, "calibrated"))
        short = by_name.get(f"{what}, calibrated, a quarter of the tokens")
        if slow is None or fast is None:
            continue
        goal = slow[-1]["eval_nll"]
        reached = next((point["tokens"] for point in fast if point["eval_nll"] <= goal), None)
        won = 1 - fast[-1]["eval_kl"] / fast[0]["eval_kl"]
        lines.append(
            f"{what}: the plain start ends at {goal:.4f}; calibrated is there after {reached} "
            f"tokens and wins back {100 * won:.0f} % of its KL"
            + (f"; a run of a quarter ends at {short[-1]['eval_nll']:.4f}" if short else "")
        )
    return lines


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    colours = {"MQA": "#0072B2", "CLA2 + GQA-4": "#009E73", "MLA 12.5 %": "#D55E00"}
    styles = {"calibrated": "-", "mean": "--", "plain": "--", "random keys and values": ":"}
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    order = [run.name for run in RUNS]
    rows = sorted(rows, key=lambda row: order.index(row["name"]))
    (source,) = [row["curve"] for row in rows if row["what"] == "source"]
    for row in rows:
        style = styles.get(row["start"], "-.")
        lost = [
            (point["tokens"] / 1000, point["eval_nll"] - source[0]["eval_nll"])
            for point in row["curve"]
            if point is not source[0]
        ]
        colour = colours.get(row["what"], "#000000")
        axes.plot(*zip(*lost, strict=True), style, color=colour, label=row["name"], marker=".")
    axes.set(
        xlabel="thousand tokens of training",
        ylabel="nats per token over the source as it was, validation text",
        yscale="log",
        ylim=(None, 12),
        title=f"{MODEL}: converted, then distilled from the source",
    )
    axes.legend(frameon=False, fontsize=7, ncols=2)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="Folder with models/ and text/.")
    parser.add_argument("--work", type=Path, required=True, help="Folder for starts and state.")
    parser.add_argument("--only", nargs="+", help="Runs of these names.")
    parser.add_argument("--search", action="store_true", help="Short runs at several rates.")
    parser.add_argument("--rates", type=float, nargs="+", default=_RATES, help="For the search.")
    parser.add_argument("--tokens", type=int, default=40_960, help="Of a run of the search.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
