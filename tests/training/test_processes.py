"""Two processes that train together; on CPUs torchrun starts them, on GPUs accelerate launch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from convert.checkpoint.manifest import read_manifest
from tests.helpers import assert_close, load_folder
from tests.training.small import Place, weights

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes/uptraining/fsdp2-8gpu-accelerate.yaml"


def _launched(
    module: str, arguments: list[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command that two processes run together."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [sys.executable, *launch, "-m", module, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, **(environment or {})},
    )
    assert run.returncode == 0, run.stderr
    return run


def _compare(one: Path, two: Path, rounding: float = 1e-4) -> None:
    """Fail unless two processes did what one did."""
    (single,), (double,) = (read_manifest(out)["trainings"] for out in (one, two))
    assert double["processes"] == 2
    assert double["steps"] == single["steps"]
    for ours, theirs in zip(double["curve"], single["curve"], strict=True):
        assert ours == pytest.approx(theirs, rel=rounding)


@pytest.mark.slow
def test_two_processes_do_what_one_does_in_two_passes(place: Place, tmp_path: Path) -> None:
    start = place.converted("cla")
    flags = ("--tokens", "256", "--eval-text", str(place.held), "--eval-samples", "4")
    one, two = tmp_path / "one", tmp_path / "two"
    assert place.uptrain(start, one, *flags, "--grad-accumulation", "2").code == 0
    _launched("convert", place.arguments(start, two, *flags))
    _compare(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-6), ("bf16", 2e-3)])
def test_shards_of_two_processes_are_trained_as_one_model(
    precision: str, rounding: float, place: Place, tmp_path: Path
) -> None:
    """With the settings of the recipe, and fused attention in what is sharded."""
    start, one, two = place.converted("cla"), tmp_path / "one", tmp_path / "two"
    flags = ("--tokens", "256", "--eval-text", str(place.held), "--eval-samples", "4")
    flags += ("--precision", precision)
    assert place.uptrain(start, one, *flags, "--grad-accumulation", "2").code == 0
    keys = yaml.safe_load(CONFIG.read_text())["fsdp_config"]
    settings = {key.upper(): str(value) for key, value in keys.items()}
    arguments = [word for word in place.arguments(start, two, *flags) if word != "--quiet"]
    run = _launched(
        "tests.training.sharded", arguments, {"ACCELERATE_USE_FSDP": "true", **settings}
    )
    layers = len(load_folder(start).model.layers)
    assert f"{layers + 1} sharded units" in run.stderr
    assert "losses in {torch.float32}" in run.stderr
    assert "attention of the student: kernels compute all attention of 0 of" in run.stderr
    _compare(one, two, 1e-4 if precision == "fp32" else 2e-2)
    want, have = weights(one), weights(two)
    assert want.keys() == have.keys()
    for name, weight in want.items():
        assert_close(have[name], weight, atol=rounding)
