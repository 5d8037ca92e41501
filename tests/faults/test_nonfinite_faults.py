"""Weights and activations that are no numbers, or too large to compute with, are named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.stock import make
from tests.families.texts import random_text, write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import Run, cli, names
from tests.helpers import load_folder

_WAYS = {
    "gqa": ["gqa", "--kv-heads", "2", "--merge", "svd"],
    "cla": ["cla", "--share", "2", "--merge", "svd"],
    "auto": ["cla", "--share", "2", "--merge", "svd", "--layers", "auto"],
    "mla": ["mla", "--kv-budget", "50%"],
}
_LAYER = "model.layers.1."
_TOO_LARGE = 1e30  # in float32 when weights are multiplied by it


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    make("llama", {**settings("llama"), "num_hidden_layers": 4}).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    (folder / "text.txt").write_text(random_text(300, seed=0))
    return folder / "model"


def _damaged(
    source: Path, folder: Path, name: str, factor: float, dtype: torch.dtype = torch.float32
) -> Path:
    """The source in a dtype, a tensor of it multiplied, or with NaN in its first row."""
    shutil.copytree(source, folder)
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    if math.isnan(factor):
        tensors[name][0] = factor
    else:
        tensors[name] = tensors[name] * factor
        assert torch.isfinite(tensors[name]).all()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    stored = {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config | stored))
    return folder


def _converted(model: Path, way: str, text: Path | None, *flags: str) -> Run:
    method, *how = _WAYS[way]
    if text is not None:
        how += ["--calibration", str(text), "--samples", "8", "--context", "16"]
    return cli([method, str(model), str(model.with_name("out")), *how, *flags])


def _left(folder: Path) -> list[str]:
    """What is in a folder beside the layers that were finished before."""
    return [name for name in names(folder) if not name.startswith(".out.partial-")]


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("way", _WAYS)
def test_weights(source: Path, tmp_path: Path, way: str, calibrated: bool) -> None:
    name = f"{_LAYER}self_attn.k_proj.weight"
    model = _damaged(source, tmp_path / "model", name, math.nan)
    run = _converted(model, way, source.parent / "text.txt" if calibrated else None)
    assert run.code == 3, run.err
    assert name in run.err
    assert _left(tmp_path) == ["model"]


@pytest.mark.parametrize("refit", ["none", "qo"])
@pytest.mark.parametrize(
    ("name", "factor", "where"),
    [
        (f"{_LAYER}mlp.down_proj.weight", math.nan, "layer 1 gives"),
        (f"{_LAYER}mlp.down_proj.weight", 1e20, "layer 1 gives"),  # finite, but not its squares
        (f"{_LAYER}self_attn.v_proj.weight", _TOO_LARGE, "layer 1 gives"),
        (f"{_LAYER}self_attn.o_proj.weight", _TOO_LARGE, "layer 1 gives"),
        ("model.embed_tokens.weight", _TOO_LARGE, "the embeddings give"),
    ],
    ids=["nan", "squares", "values", "output", "embeddings"],
)
@pytest.mark.parametrize("way", _WAYS)
def test_activations(
    source: Path, tmp_path: Path, way: str, name: str, factor: float, where: str, refit: str
) -> None:
    model = _damaged(source, tmp_path / "model", name, factor)
    run = _converted(model, way, source.parent / "text.txt", "--refit", refit)
    assert run.code == 3, run.err
    assert f"error: {where} NaN or infinity on the calibration text" in run.err
    assert "hint: Use a sound checkpoint" in run.err
    assert _left(tmp_path) == ["model"]


def test_scores_that_nothing_can_be_fitted_to(source: Path, tmp_path: Path) -> None:
    """Attention's outcome is sound here, since the largest score takes all of the weight."""
    name = f"{_LAYER}self_attn.q_proj.weight"
    model = _damaged(source, tmp_path / "model", name, _TOO_LARGE)
    run = _converted(model, "gqa", source.parent / "text.txt")
    assert run.code == 3, run.err
    assert "error: the weights or activations of layer 1 are too large" in run.err
    assert _converted(model, "gqa", source.parent / "text.txt", "--refit", "none").code == 0


@pytest.mark.parametrize("way", ["gqa", "cla", "auto"])
def test_results_that_overflow(source: Path, tmp_path: Path, way: str) -> None:
    name = f"{_LAYER}self_attn.q_proj.weight"
    model = _damaged(source, tmp_path / "model", name, 1e5, torch.float16)
    run = _converted(model, way, source.parent / "text.txt", "--refit", "none")
    assert run.code == 6, run.err
    assert "error: the converted layer 1 overflows in float16 (q)" in run.err
    assert "--dtype bfloat16" in run.err
    wide = _converted(model, way, source.parent / "text.txt", "--refit", "none", "--dtype=float32")
    assert wide.code == 0, wide.err


@torch.no_grad()
@pytest.mark.parametrize("way", _WAYS)
def test_activations_beyond_float16_are_sound(source: Path, tmp_path: Path, way: str) -> None:
    name = f"{_LAYER}mlp.down_proj.weight"
    model = _damaged(source, tmp_path / "model", name, 6e4, torch.float16)
    states = load_folder(model)(torch.arange(97)[None], output_hidden_states=True).hidden_states
    assert 65504 < states[-2].abs().max() < torch.inf
    run = _converted(model, way, source.parent / "text.txt")
    assert run.code == 0, run.err
