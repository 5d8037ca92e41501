"""What can be refused without weights is refused before any is read, by a run and by its plan.

More refusals of latents are in ``test_mla_refusals.py`` and ``test_export_refusals.py``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.stock import make
from tests.families.texts import random_text
from tests.families.tiny import settings
from tests.faults.running import Run, cli
from tests.messages import texts
from tests.mla import SMALL, Source, sources
from tests.test_mla_refusals import REFUSED_FLAGS, REFUSED_MODELS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sources(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(random_text(800, seed=0))
    return file


_GQA = ("gqa", "--kv-heads", "2")
_SVD = (*_GQA, "--merge", "svd")
_CLA = ("cla", "--share", "2")
_AUTO = (*_CLA, "--layers", "auto")
_MLA = ("mla", *SMALL)
_SHARE = ("mla", "--kv-budget", "25%")
# model, command, part of the message; {text} is a file to calibrate on
_REFUSED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "converted": ("converted", _GQA, "this kvpatch_gpt2 model is a conversion already"),
    "heads": ("llama", ("gqa", "--kv-heads", "3"), "--kv-heads 3 does not work for a llama model"),
    "single": ("wide", ("mqa",), "has a single KV head (MQA) already"),
    "context": (
        "llama",
        (*_SVD, "--calibration", "{text}", "--context", "65"),
        "--context 65 is longer than this model's 64 tokens",
    ),
    "clip": ("olmo:bias-clip", _SVD, "--merge svd would change what clip_qkv 0.7 cuts off"),
    "alibi": (
        "bloom",
        (*_SVD, "--calibration", "{text}"),
        "--calibration does not work for bloom, whose scores have ALiBi",
    ),
    "similar-norm": (
        "qwen3",
        (*_SVD, "--group", "similar"),
        "--group similar does not work here: this model's queries and keys have a norm",
    ),
    "similar-alibi": (
        "bloom",
        (*_SVD, "--group", "similar"),
        "--group similar does not work for bloom, whose query heads",
    ),
    "refit": (
        "qwen3",
        (*_GQA, "--refit", "q", "--calibration", "{text}"),
        "--refit q does not work here: a norm stands between the projections",
    ),
    "target": ("gpt2", (*_GQA, "--target", "native"), "--target native: there is no such class"),
    "class": ("mixtral", _CLA, "no model class holds a mixtral model with layers that share"),
    "range": ("llama", (*_CLA, "--layers", "1:9"), "--layers 1:9 is no range of the 2 layers"),
    "one": ("llama", (*_CLA, "--layers", "1:2"), "--layers 1:2 is one layer"),
    "kinds": ("gemma2", _CLA, "layers 0 and 1 of this model cannot share keys and values"),
    "kinds-auto": ("gemma2", _AUTO, "no two adjacent layers of this model after layer 0"),
    "exported": (
        "ours",
        ("export", "--target", "kvpatch"),
        "this model is a KvpatchLlamaForCausalLM already",
    ),
    "export": (
        "ours",
        ("export", "--target", "native"),
        "--target native: no latent attention of transformers holds this KvpatchLlama",
    ),
    "export-serving": (
        "native",
        ("export", "--target", "native", "--serving"),
        "--serving: servers would not load the result as it should be",
    ),
    "plan": (
        "smollm3",
        ("cla", "--share", "4", "--layers", "auto"),
        "no plan keeps the keys and values of 1 of the 4 layers",
    ),
}
# what headers say, and what there is room for: exit code, too
_ROOM = ("--max-ram", "1MB")
_HEADERS: dict[str, tuple[str, tuple[str, ...], int, str]] = {
    "gqa-shapes": ("narrow", _GQA, 3, "config.json contradicts the tensors"),
    "auto-shapes": ("narrow", _AUTO, 3, "config.json contradicts the tensors"),
    "mla-shapes": ("narrow", _MLA, 3, "config.json contradicts the tensors"),
    "share-shapes": ("narrow", _SHARE, 3, "contradicts the tensors"),
    "gqa-quantised": ("quantised", _GQA, 3, "the weights are quantised"),
    "auto-quantised": ("quantised", _AUTO, 3, "the weights are quantised"),
    "mla-quantised": ("quantised", _MLA, 3, "the weights are quantised"),
    "gqa-memory": ("three", (*_GQA, *_ROOM), 4, "--max-ram allows 1.00 MB"),
    "auto-memory": ("three", (*_AUTO, *_ROOM), 4, "--max-ram allows 1.00 MB"),
    "mla-memory": ("three", (*_MLA, *_ROOM), 4, "--max-ram allows 1.00 MB"),
    "share-memory": ("three", (*_SHARE, *_ROOM), 4, "--max-ram allows 1.00 MB"),
    "export-memory": ("native", ("export", "--target", "kvpatch", *_ROOM), 4, "1.00 MB"),
}


def _narrow(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name][:-1].contiguous()


def _quantised(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 48, dtype=torch.uint8)


_DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "narrow": _narrow,
    "quantised": _quantised,
}


@pytest.fixture(scope="module")
def model(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder by the name of its case."""
    root = tmp_path_factory.mktemp("made")
    made = {
        "converted": ["gqa", str(source("gpt2")), str(root / "converted"), "--kv-heads", "2"],
        "native": ["mla", str(source("llama")), str(root / "native"), *SMALL],
        "ours": ["mla", str(source("llama")), str(root / "ours"), *SMALL, "--target", "kvpatch"],
    }
    assert all(cli(command).code == 0 for command in made.values())
    make("llama", settings("llama") | {"num_hidden_layers": 3}).save_pretrained(root / "three")
    for name, damage in _DAMAGE.items():
        shutil.copytree(root / "three", root / name)
        weights = load_file(root / name / "model.safetensors")
        damage(weights)
        save_file(weights, root / name / "model.safetensors", metadata={"format": "pt"})
    return lambda name: root / name if (root / name).exists() else source(name)


def _run(folder: Path, out: Path, command: tuple[str, ...], text: Path | None = None) -> Run:
    method, *flags = (word.format(text=text) for word in command)
    return cli([method, str(folder), str(out), *flags])


@pytest.mark.parametrize("way", [(), ("--dry-run",)], ids=["run", "plan"])
@pytest.mark.parametrize("case", _REFUSED)
def test_recipes_that_a_model_does_not_allow_are_refused_at_once(
    model: Callable[[str], Path],
    tmp_path: Path,
    text: Path,
    no_weights: None,
    case: str,
    way: tuple[str, ...],
) -> None:
    name, command, reason = _REFUSED[case]
    run = _run(model(name), tmp_path / "out", (*command, *way), text)
    assert (run.code, run.out) == (2, ""), run.err
    assert reason in run.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", _HEADERS)
def test_what_headers_tell_is_refused_before_weights_are_read(
    model: Callable[[str], Path], tmp_path: Path, no_weights: None, case: str
) -> None:
    name, command, code, reason = _HEADERS[case]
    run = _run(model(name), tmp_path / "out", command)
    assert (run.code, run.out) == (code, ""), run.err
    assert reason in run.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [_GQA, _AUTO, _MLA, _SHARE], ids=" ".join)
def test_a_full_disk_is_seen_before_weights_are_read(
    model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_weights: None,
    command: tuple[str, ...],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    run = _run(model("three"), tmp_path / "out", command)
    assert run.code == 4
    assert f"1.00 kB are free at {tmp_path}" in run.err


# files whose usage errors need no weights
_WALKED = (
    "convert/choosing.py",
    "convert/exporting.py",
    "convert/foreseen.py",
    "convert/latent_sizes.py",
    "convert/latents.py",
    "convert/scheme.py",
    "convert/serving_sizes.py",
    "convert/sharing.py",
    "convert/targets/__init__.py",
)


@pytest.mark.slow
def test_no_refusal_is_left_out(
    model: Callable[[str], Path], tmp_path: Path, text: Path, no_weights: None
) -> None:
    """Each message of these files is said in a case, here or in the tests of latents."""
    cases = [
        *((name, command) for name, command, _ in _REFUSED.values()),
        *((name, _MLA) for name in REFUSED_MODELS),
        *((name, ("mla", *map(str, flags))) for name, flags, _ in REFUSED_FLAGS.values()),
    ]
    said = "\n".join(_run(model(name), tmp_path / "out", how, text).err for name, how in cases)
    raised = {t.text for t in texts() if t.file in _WALKED and t.error == "UsageError"} - {"\0"}
    assert len(raised) > 25
    for message in raised:
        assert re.search(".*".join(map(re.escape, message.split("\0"))), said), message
