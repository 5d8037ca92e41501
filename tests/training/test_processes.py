"""Two processes that train together; on CPUs torchrun starts them, on GPUs accelerate launch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from convert.checkpoint.manifest import read_manifest
from tests.training.small import Place


@pytest.mark.slow
def test_two_processes_do_what_one_does_in_two_passes(place: Place, tmp_path: Path) -> None:
    start = place.converted("cla")
    flags = ("--tokens", "256", "--eval-text", str(place.held), "--eval-samples", "4")
    one, two = tmp_path / "one", tmp_path / "two"
    assert place.uptrain(start, one, *flags, "--grad-accumulation", "2").code == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "convert", *place.arguments(start, two, *flags)]
    run = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, check=False, timeout=200
    )
    assert run.returncode == 0, run.stderr
    (single,), (double,) = (read_manifest(out)["trainings"] for out in (one, two))
    assert double["processes"] == 2
    assert double["steps"] == single["steps"]
    for ours, theirs in zip(double["curve"], single["curve"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
