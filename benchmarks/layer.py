"""What calibration costs on one layer of the shape of Llama-2-7B, with random weights.

    python -m benchmarks.layer --samples 4 --context 512

One layer is converted from end to end, each conversion in a process of its own: to 8 KV heads, and
to latents of 512 with a rotary key of 64, without refits and with all of them. Stages are measured
in seconds by the clock, in seconds of all threads, and in the most memory that the process has had
by their end. Refits and forward passes grow with the tokens; all else depends on the widths alone.
Imports are made before. Weights and embeddings are random, so that no direction of the inputs
stands out: a latent's directions take longer to find than in a trained model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, write_result

_LAYERS = 32  # of Llama-2-7B
_WAYS: dict[str, dict[str, Any]] = {
    "gqa 32 -> 8": {"method": "gqa", "kv_heads": 8, "merge": "svd", "group": "adjacent"},
    "mla 512+64": {"method": "mla", "kv_budget": "512+64", "target": "kvpatch"},
}
_STAGES = {
    "pipeline": ("_windows", "execute"),
    "streams": ("observe",),
    "survey": ("observe", "second_moments", "joint", "attended"),
    "latent_choice": ("joint", "factored_jointly", "lost_in_latent"),
    "calibrate": ("second_moments", "refit_projections", "refit_outcome", "row_divergence"),
    "calibrate_latent": (
        "second_moments",
        "refit_latent_scores",
        "refit_outcome",
        "row_divergence",
    ),
}
_VOCABULARY = 8192  # more than tokens, so that the inputs are as many
_AT_MOST_SECONDS, _AT_MOST_BYTES = 60, 4e9  # asked of latents


def main() -> None:
    """Measure every way, with refits and without, and write ``results/layer.json``."""
    arguments = _arguments()
    asked = {"seconds": _AT_MOST_SECONDS, "peak_rss": _AT_MOST_BYTES}
    result: dict[str, Any] = {**environment(), "asked_of_latents": asked, "ways": {}}
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        _run("--make", str(model))
        for way in _WAYS:
            for refit in ("none", "qo"):
                sizes = [str(arguments.samples), str(arguments.context)]
                run = _run("--convert", str(model), way, refit, *sizes)
                result["ways"][f"{way}, refit {refit}"] = measured = json.loads(run)
                path = write_result("layer", result)
                sys.stderr.write(
                    f"{way}, refit {refit}: {measured['seconds']:.0f} s, "
                    f"{measured['cpu_seconds']:.0f} s of all threads, "
                    f"{measured['peak_rss'] / 1e9:.1f} GB\n"
                )
    sys.stdout.write(f"{path}\n")


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.layer", *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout.strip().rpartition("\n")[2]


def _make(model: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=1,
        vocab_size=_VOCABULARY,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    _number_tokenizer(PreTrainedTokenizerFast).save_pretrained(model)
    numbers = torch.randint(_VOCABULARY, (20_000,)).tolist()
    (model / "text.txt").write_text(" ".join(map(str, numbers)))


def _convert(model: Path, way: str, refit: str, samples: int, context: int) -> dict[str, Any]:
    """Convert the layer and time what happens."""
    import importlib

    from transformers import AutoTokenizer

    from convert import convert, make_recipe

    importlib.import_module("transformers.models.llama.modeling_llama")
    AutoTokenizer.from_pretrained(model)

    stages: dict[str, dict[str, float]] = {}
    for module, names in _STAGES.items():
        loaded = importlib.import_module(f"convert.{module}")
        for name in names:
            setattr(loaded, name, _measured(getattr(loaded, name), name, stages))
    keys = {"calibration": str(model / "text.txt"), "samples": samples, "context": context}
    recipe = {"source": str(model), "output": str(model.parent / "out"), "refit": refit}
    whole: dict[str, dict[str, float]] = {}
    _measured(convert, "whole", whole)(
        make_recipe({**recipe, **keys, **_WAYS[way], "overwrite": True})
    )
    measured = whole["whole"]
    stages["everything else"] = {
        clock: measured[clock] - sum(stage[clock] for stage in stages.values())
        for clock in ("seconds", "cpu_seconds")
    }
    each = measured["seconds"] - stages["_windows"]["seconds"]
    met = measured["seconds"] <= _AT_MOST_SECONDS and measured["peak_rss"] <= _AT_MOST_BYTES
    return {
        "tokens": samples * context,
        **measured,
        "met": met,
        "stages": stages,
        "hours_for_all_layers": _LAYERS * each / 3600,
    }


def _number_tokenizer(kind: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(number): number for number in range(_VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return kind(tokenizer_object=tokenizer)


def _measured(function: Any, name: str, stages: dict[str, dict[str, float]]) -> Any:
    """The function, which adds what its calls took to its stage."""

    def measured(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter(), time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            spent = stages.setdefault(name, {"seconds": 0.0, "cpu_seconds": 0.0})
            spent["seconds"] += time.perf_counter() - started[0]
            spent["cpu_seconds"] += time.process_time() - started[1]
            spent["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    return measured


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make is not None:
        _make(arguments.make)
        raise SystemExit
    if arguments.convert is not None:
        model, way, refit, samples, context = arguments.convert
        measured = _convert(Path(model), way, refit, int(samples), int(context))
        sys.stdout.write(json.dumps(measured) + "\n")
        raise SystemExit
    return arguments


if __name__ == "__main__":
    main()
