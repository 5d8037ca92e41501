"""What calibration costs on one layer of the shape of Llama-2-7B, with random weights.

    python -m benchmarks.layer --samples 4 --context 512

One layer with a small vocabulary is converted from end to end, each conversion in a process of its
own: to 8 KV heads, and to latents of 512 with a rotary key of 64. Stages are timed; the whole model
is extrapolated in proportion to tokens and layers.
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
    "calibrate": ("second_moments", "refit_projections", "refit_outcome", "row_divergence"),
    "calibrate_latent": (
        "second_moments",
        "refit_latent_scores",
        "refit_outcome",
        "row_divergence",
    ),
    "survey": ("attended",),
}


def main() -> None:
    """Measure every way, with refits and without, and write ``results/layer.json``."""
    arguments = _arguments()
    result: dict[str, Any] = {**environment(), "ways": {}}
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
                    f"{way}, refit {refit}: {measured['whole']:.0f} s, "
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
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, vocab_size=256
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    _byte_tokenizer(PreTrainedTokenizerFast).save_pretrained(model)
    (model / "text.txt").write_text(" ".join(str(n) for n in range(20_000)))


def _convert(model: Path, way: str, refit: str, samples: int, context: int) -> dict[str, Any]:
    """Convert the layer and time what happens."""
    import importlib

    from convert import convert, make_recipe

    spent: dict[str, float] = {}
    for module, names in _STAGES.items():
        loaded = importlib.import_module(f"convert.{module}")
        for name in names:
            setattr(loaded, name, _timed(getattr(loaded, name), name, spent))
    keys = {"calibration": str(model / "text.txt"), "samples": samples, "context": context}
    recipe = {"source": str(model), "output": str(model.parent / "out"), "refit": refit}
    started = time.perf_counter()
    convert(make_recipe({**recipe, **keys, **_WAYS[way], "overwrite": True}))
    whole = time.perf_counter() - started
    spent["everything else"] = whole - sum(spent.values())
    return {
        "tokens": samples * context,
        "whole": whole,
        "seconds": spent,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "hours_for_all_layers": _LAYERS * whole / 3600,
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
