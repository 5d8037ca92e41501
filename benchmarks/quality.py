"""What each merge loses, on real checkpoints, and what calibration costs.

    python -m benchmarks.quality --data ../shared/data

Every conversion is made by the public API and measured by its evaluation: windows of 256 tokens of
a validation text, against the source. Calibration reads the training text of the same data set.
The last part times the stages of calibration on one layer of the shape of Llama-2-7B, with random
weights, and extrapolates to the whole model.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, write_result

CONTEXT = 256
SAMPLES = 40
_SEVEN_B_LAYERS = 32
_STEPS: Mapping[str, Mapping[str, Any]] = {
    "mean": {"merge": "mean"},
    "first": {"merge": "first"},
    "svd data-free": {"merge": "svd"},
    "svd calibrated": {"merge": "svd", "group": "adjacent", "refit": "none"},
    "+ group similar": {"merge": "svd", "group": "similar", "refit": "none"},
    "+ refit q": {"merge": "svd", "group": "similar", "refit": "q"},
    "+ refit qo": {"merge": "svd", "group": "similar", "refit": "qo"},
}
_CLA_STEPS: Mapping[str, Mapping[str, Any]] = {
    "mean": {"merge": "mean"},
    "first": {"merge": "first"},
    "svd data-free": {"merge": "svd"},
    "svd calibrated": {"merge": "svd", "refit": "none"},
    "+ refit qo": {"merge": "svd", "refit": "qo"},
}


def main() -> None:
    """Measure, write ``results/quality.json`` and print a table."""
    arguments = _arguments()
    result: dict[str, Any] = {
        **environment(),
        "conditions": {
            "windows": f"of {CONTEXT} tokens of the validation text, the first ones",
            "calibration": f"{SAMPLES} windows of {CONTEXT} tokens of the training text, seed 0",
            "lost": "nats per token over the source",
            "seconds": "the whole conversion in one process, imports aside",
        },
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as work:
        if arguments.layer:
            result["llama_2_7b_layer"] = _seven_b_layer(Path(work))
        for row in conversions(arguments.data, Path(work)):
            result["rows"].append(row)
            path = write_result("quality", result)  # after each row: the whole takes half an hour
            sys.stderr.write(
                f"{row['model']} {row['what']:16s} {row['step']:16s} lost {row['lost']:.4f} nats, "
                f"perplexity {row['perplexity']:.2f}, {row['seconds']:.0f} s\n"
            )
    sys.stdout.write(f"{path}\n")


def conversions(data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """One row for each conversion."""
    classics = data / "models" / "classics-mha-6m"
    stories = data / "models" / "stories260k-mha"
    train, valid = (data / "text" / f"classics_{part}.txt" for part in ("train_4mb", "valid"))
    told, held = (data / "text" / f"tinystories_{part}.txt" for part in ("train", "valid"))
    for heads in (4, 2, 1):
        recipe: dict[str, Any] = {"method": "gqa", "kv_heads": heads}
        for step, keys in _STEPS.items():
            if heads > 1 or step != "+ group similar":
                plain = keys if heads > 1 else {k: v for k, v in keys.items() if k != "group"}
                yield _row(classics, train, valid, 48, f"8 -> {heads}", step, recipe | plain, work)
    for heads in (4, 2):
        for step, keys in _STEPS.items():
            if heads == 2 or step in {"mean", "first", "svd data-free", "+ refit qo"}:
                recipe = {"method": "gqa", "kv_heads": heads, **keys}
                yield _row(stories, told, held, 48, f"8 -> {heads}", step, recipe, work)
    for heads in (8, 4):
        for step, keys in _CLA_STEPS.items():
            recipe = {"method": "cla", "share": 2, "kv_heads": heads, **keys}
            what = "CLA2" if heads == 8 else "CLA2 + GQA-4"
            yield _row(classics, train, valid, 24, what, step, recipe, work)
    recipe = {"method": "cla", "share": 2, "layers": "1:5", **_CLA_STEPS["+ refit qo"]}
    yield _row(classics, train, valid, 24, "CLA2, layers 1:5", "+ refit qo", recipe, work)


def _row(  # noqa: PLR0917 - one line for each conversion reads best
    source: Path,
    train: Path,
    valid: Path,
    windows: int,
    what: str,
    step: str,
    recipe: Mapping[str, Any],
    work: Path,
) -> dict[str, Any]:
    from convert import convert, make_recipe
    from convert.evaluate import evaluate_checkpoint

    out = work / "out"
    free = recipe["merge"] != "svd" or step == "svd data-free"
    keys = {} if free else {"calibration": str(train), "samples": SAMPLES, "context": CONTEXT}
    started = time.perf_counter()
    convert(make_recipe({"source": str(source), "output": str(out), **keys, **recipe}))
    seconds = time.perf_counter() - started
    measured = evaluate_checkpoint(out, valid, against=source, context=CONTEXT, samples=windows)
    shutil.rmtree(out)
    assert measured.against is not None
    return {
        "model": source.name,
        "what": what,
        "step": step,
        "windows": windows,
        "source_perplexity": measured.against.perplexity,
        "perplexity": measured.perplexity,
        "lost": measured.nll - math.log(measured.against.perplexity),
        "kl": measured.against.kl,
        "seconds": seconds,
    }


def _seven_b_layer(work: Path) -> dict[str, Any]:
    """Stages of calibration on one layer of Llama-2-7B's shape, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quality", "--stages", str(work / "layer")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return measured


def _stages(work: Path) -> dict[str, Any]:
    """Convert one random layer with two windows of 512 tokens and time what happens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from convert import calibrate, convert, make_recipe

    samples, context = 2, 512
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, vocab_size=256
    )
    work.mkdir()
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(work / "model")
    _byte_tokenizer(PreTrainedTokenizerFast).save_pretrained(work / "model")
    (work / "text.txt").write_text(" ".join(str(n) for n in range(4000)))
    spent: dict[str, float] = {}
    for name in ("second_moments", "refit_projections", "refit_outcome", "row_divergence"):
        setattr(calibrate, name, _timed(getattr(calibrate, name), name, spent))
    keys = {"kv_heads": 8, "merge": "svd", "calibration": str(work / "text.txt")}
    keys |= {"samples": samples, "context": context, "group": "adjacent", "refit": "qo"}
    started = time.perf_counter()
    out = str(work / "out")
    convert(make_recipe({"method": "gqa", "source": str(work / "model"), "output": out, **keys}))
    whole = time.perf_counter() - started
    spent["everything else"] = whole - sum(spent.values())
    per_token = {name: seconds / (samples * context) for name, seconds in spent.items()}
    tokens = SAMPLES * context
    return {
        "kv_heads": [32, 8],
        "tokens": samples * context,
        "seconds": spent,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "extrapolated": {
            "tokens": tokens,
            "layers": _SEVEN_B_LAYERS,
            "hours": _SEVEN_B_LAYERS * tokens * sum(per_token.values()) / 3600,
            "how": "time of every stage in proportion to the tokens, times the layers",
        },
    }


def _byte_tokenizer(kind: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return kind(tokenizer_object=tokenizer)


def _timed(function: Any, name: str, spent: dict[str, float]) -> Any:
    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    return timed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="Folder with models/ and text/.")
    parser.add_argument("--layer", action="store_true", help="Also time a layer of Llama-2-7B.")
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stages is not None:
        sys.stdout.write(json.dumps(_stages(arguments.stages)) + "\n")
        raise SystemExit
    if arguments.data is None:
        parser.error("--data is needed")
    return arguments


if __name__ == "__main__":
    main()
