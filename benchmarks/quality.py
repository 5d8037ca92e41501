"""What each merge loses, on real checkpoints, and what calibration costs.

    python -m benchmarks.quality --data ../shared/data

Every conversion is made by the public API and measured by its evaluation: windows of 256 tokens of
a validation text, against the source. Calibration reads the training text of the same data set.
``--only`` measures some of the parts again and keeps the rows of the others.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, environment, write_result

CONTEXT = 256
SAMPLES = 96
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

# rank and rotary dims of 25, 12.5 and 6.25 % of the 512 KV values per token and layer
_LATENTS = {"MLA 25 %": (96, 32), "MLA 12.5 %": (32, 32), "MLA 6.25 %": (16, 16)}
# at this rank a latent holds the whole input, and with all planes of all heads every key turns
_HIDDEN, _ALL_PLANES = 256, 256
_MLA_STEPS: Mapping[str, Mapping[str, Any]] = {
    "data-free": {},
    "cut alone": {"refit": "none", "rank": _HIDDEN},
    "calibrated": {"refit": "none"},
    "+ refit q": {"refit": "q"},
    "+ refit qo": {"refit": "qo"},
}
_STAGES = {
    "mixing alone": "complex mixing, every component rotary, a latent of the hidden width",
    "cut alone": "mixed and cut, a latent of the hidden width",
    "calibrated": "mixed, cut and factored",
    "+ refit q": "then queries, the rotary key and the maps from latents to keys refitted",
    "+ refit qo": "then values and the output projection too",
    "one table": "the same with as many pairs of each frequency in all layers, which one table of "
    "frequencies needs: the next row exported to kvpatch, which has no norm",
    "emitted": "the same as a DeepseekV3ForCausalLM: its norm, and the constant dim that keeps it "
    "from doing anything, are what it has beside the row before",
}
_LAYERS_STEPS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("25 %", "one split"): {},
    ("25 %", "per layer"): {"per_layer": True},
    ("12.5 %", "one split"): {},
    ("12.5 %", "per layer, calibrated"): {"per_layer": True, "refit": "none"},
    ("12.5 %", "per layer"): {"per_layer": True},
    ("12.5 %", "share 2"): {"share": 2},
    ("6.25 %", "one split"): {},
    ("6.25 %", "per layer"): {"per_layer": True},
    ("6.25 %", "share 2"): {"share": 2},
}


def main() -> None:
    """Measure, write ``results/quality.json`` and print a line for each conversion."""
    arguments = _arguments()
    parts = arguments.only or list(_PARTS)
    kept = _kept(parts)
    result: dict[str, Any] = {
        **environment(),
        "conditions": {
            "windows": f"of {CONTEXT} tokens of the validation text, the first ones",
            "calibration": f"{SAMPLES} windows of {CONTEXT} tokens of the training text, seed 0",
            "lost": "nats per token over the source",
            "kl": "nats per token from the source, mean over tokens",
            "kv_bytes": "per token, in all layers of the result together",
            "seconds": "the whole conversion in one process, imports aside",
            "stages": _STAGES,
            "mla-layers": "a share of the cache, with refits qo unless calibrated alone: one split "
            "for all layers, one for each layer, or one latent for 2 layers",
        },
        "rows": kept,
    }
    with tempfile.TemporaryDirectory() as work:
        for part in parts:
            for row in _PARTS[part](_Place(arguments.data, Path(work))):
                commit = result["commit"]["hash"]
                result["rows"].append({"part": part, "commit": commit, **row})
                path = write_result("quality", result)  # after each row: the whole takes long
                sys.stderr.write(
                    f"{row['model']} {row['what']:16s} {row['step']:16s} lost {row['lost']:.4f} "
                    f"nats, KL {row['kl']:.2g}, perplexity {row['perplexity']:.2f}, "
                    f"{row['seconds']:.0f} s\n"
                )
    sys.stdout.write(f"{path}\n")


def _kept(measured: list[str]) -> list[dict[str, Any]]:
    """Rows of the parts that are not measured again."""
    path = RESULTS / "quality.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [row for row in rows if row.get("part", measured[0]) not in measured]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where things are: the data, and a folder for results."""

    data: Path
    work: Path

    def model(self, name: str) -> Path:
        """Folder of a checkpoint."""
        return self.data / "models" / name

    def texts(self, model: str) -> tuple[Path, Path]:
        """What a model is calibrated and measured on."""
        classics = ("classics_train_4mb.txt", "classics_valid.txt")
        stories = ("tinystories_train.txt", "tinystories_valid.txt")
        train, valid = classics if model.startswith("classics") else stories
        return self.data / "text" / train, self.data / "text" / valid


_CLASSICS, _STORIES = "classics-mha-6m", "stories260k-mha"


def _gqa(place: _Place) -> Iterator[dict[str, Any]]:
    for heads in (4, 2, 1):
        recipe: dict[str, Any] = {"method": "gqa", "kv_heads": heads}
        for step, keys in _STEPS.items():
            if heads > 1 or step != "+ group similar":
                plain = keys if heads > 1 else {k: v for k, v in keys.items() if k != "group"}
                yield _row(place, _CLASSICS, 48, f"8 -> {heads}", step, recipe | plain)


def _small(place: _Place) -> Iterator[dict[str, Any]]:
    for heads in (4, 2):
        for step, keys in _STEPS.items():
            if heads == 2 or step in {"mean", "first", "svd data-free", "+ refit qo"}:
                recipe = {"method": "gqa", "kv_heads": heads, **keys}
                yield _row(place, _STORIES, 48, f"8 -> {heads}", step, recipe)
    sizes = {"method": "mla", "rank": 16, "rope_dims": 16, "target": "kvpatch"}
    for step in ("calibrated", "+ refit qo"):
        yield _row(place, _STORIES, 48, "MLA 25 %", step, sizes | _MLA_STEPS[step])


def _cla(place: _Place) -> Iterator[dict[str, Any]]:
    for heads in (8, 4):
        for step, keys in _CLA_STEPS.items():
            recipe = {"method": "cla", "share": 2, "kv_heads": heads, **keys}
            what = "CLA2" if heads == 8 else "CLA2 + GQA-4"
            yield _row(place, _CLASSICS, 24, what, step, recipe)
    recipe = {"method": "cla", "share": 2, "layers": "1:5", **_CLA_STEPS["+ refit qo"]}
    yield _row(place, _CLASSICS, 24, "CLA2, layers 1:5", "+ refit qo", recipe)


def _mla(place: _Place) -> Iterator[dict[str, Any]]:
    whole = {"rank": _HIDDEN, "rope_dims": _ALL_PLANES, "refit": "none", "target": "kvpatch"}
    yield _row(place, _CLASSICS, 32, "MLA", "mixing alone", {"method": "mla", **whole})
    for what, (rank, rope) in _LATENTS.items():
        yield _published_row(place, what, rank, rope)
        sizes = {"method": "mla", "rank": rank, "rope_dims": rope}
        for step, keys in _MLA_STEPS.items():
            yield _row(place, _CLASSICS, 32, what, step, {**sizes, "target": "kvpatch", **keys})
        yield from _emitted_rows(place, what, sizes)


def _emitted_rows(place: _Place, what: str, sizes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the class of transformers costs: one table of frequencies, and a norm made inert."""
    from convert import convert, make_recipe

    conversion = {**sizes, "refit": "qo", "target": "native"}
    stock, seconds = _converted(place, _CLASSICS, conversion, calibrated=True)
    ours = place.work / "exported"
    export = {"method": "export", "target": "kvpatch"}
    convert(make_recipe({"source": str(stock), "output": str(ours), **export}))
    for step, out in (("one table", ours), ("emitted", stock)):
        yield {
            "what": what,
            "step": step,
            **_measured(place, _CLASSICS, 32, out),
            "seconds": seconds,
        }


def _mla_layers(place: _Place) -> Iterator[dict[str, Any]]:
    for (budget, step), keys in _LAYERS_STEPS.items():
        recipe = {"method": "mla", "kv_budget": budget.replace(" ", ""), "refit": "qo", **keys}
        recipe["target"] = "kvpatch"
        yield _row(place, _CLASSICS, 32, f"MLA {budget}", step, recipe)


def _published_row(place: _Place, what: str, rank: int, rope: int) -> dict[str, Any]:
    """The published method, measured on the same windows."""
    from benchmarks.literature import published_loss
    from convert.texts import windows_from

    source, (train, valid) = place.model(_CLASSICS), place.texts(_CLASSICS)
    started = time.perf_counter()
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    read = windows_from(source, train, rows=rows, samples=SAMPLES, context=CONTEXT, seed=0)
    held = _first_windows(source, valid, 32)
    found = published_loss(source, read.tokens, held, rank=rank, pairs=rope // 2)
    return {
        "model": source.name,
        "what": what,
        "step": "published",
        "windows": 32,
        "source_perplexity": found.source_perplexity,
        "perplexity": found.perplexity,
        "lost": math.log(found.perplexity / found.source_perplexity),
        "kl": found.kl,
        "seconds": time.perf_counter() - started,
    }


def _first_windows(source: Path, text: Path, count: int) -> Any:
    from torch import tensor
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)(text.read_text(), add_special_tokens=False)
    return tensor(tokens["input_ids"][: count * CONTEXT]).view(count, CONTEXT)


_PARTS = {"gqa": _gqa, "small": _small, "cla": _cla, "mla": _mla, "mla-layers": _mla_layers}


def _row(  # noqa: PLR0917 - one line for each conversion reads best
    place: _Place, model: str, windows: int, what: str, step: str, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    free = "data-free" in step or recipe.get("merge", "svd") != "svd"
    out, seconds = _converted(place, model, recipe, calibrated=not free)
    measured = _measured(place, model, windows, out)
    return {"what": what, "step": step, **measured, "seconds": seconds}


def _converted(
    place: _Place, model: str, recipe: Mapping[str, Any], *, calibrated: bool
) -> tuple[Path, float]:
    """The folder of a conversion, and the seconds it took."""
    from convert import convert, make_recipe

    source, (train, _), out = place.model(model), place.texts(model), place.work / "out"
    text = {"calibration": str(train), "samples": SAMPLES, "context": CONTEXT}
    paths = {"source": str(source), "output": str(out)}
    started = time.perf_counter()
    convert(make_recipe({**paths, **(text if calibrated else {}), **recipe}))
    return out, time.perf_counter() - started


def _measured(place: _Place, model: str, windows: int, out: Path) -> dict[str, Any]:
    """What a conversion lost; its folder is removed."""
    from convert.checkpoint.manifest import read_manifest
    from convert.evaluate import evaluate_checkpoint

    source, (_, valid) = place.model(model), place.texts(model)
    found = evaluate_checkpoint(out, valid, against=source, context=CONTEXT, samples=windows)
    _, after = read_manifest(out)["kv_cache"]["bytes_per_token"]
    shutil.rmtree(out)
    assert found.against is not None
    return {
        "model": source.name,
        "windows": windows,
        "source_perplexity": found.against.perplexity,
        "perplexity": found.perplexity,
        "lost": found.nll - math.log(found.against.perplexity),
        "kl": found.against.kl,
        "kv_bytes": after,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="Folder with models/ and text/.")
    parser.add_argument("--only", nargs="+", choices=_PARTS, help="Measure these parts alone.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
