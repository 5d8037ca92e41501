"""What servers of DeepSeek models load can be trained, if its layers get no biases by it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.families.stock import make
from tests.families.texts import write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import Run, cli
from tests.training.small import FLAGS, Place


def test_adapters_leave_a_form_without_biases(place: Place, tmp_path: Path) -> None:
    source, served, start = (tmp_path / name for name in ("source", "served", "start"))
    torch.manual_seed(7)
    wide = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 1}
    make("llama", settings("llama") | wide).save_pretrained(source)
    write_tokenizer(source)
    budget = ("--kv-budget", "256+64", "--rope-select", "stride")
    assert cli(["mla", str(source), str(served), "--serving", *budget, "-q"]).code == 0
    assert cli(["export", str(served), str(start), "--target", "kvpatch", "-q"]).code == 0

    def trained(name: str, *flags: str) -> Run:
        """Train, and export for servers again."""
        out = tmp_path / name
        texts = ("--data", str(place.text), "--teacher", str(source), *FLAGS, "--tokens", "64")
        run = cli(["uptrain", str(start), str(out), *texts, *flags])
        assert run.code == 0, run.err
        again = str(tmp_path / f"{name}-served")
        return cli(["export", str(out), again, "--target", "native", "--serving", "-q"])

    assert trained("adapters", "--lora", "2").code == 0
    refused = trained("all")
    assert refused.code == 3
    assert "for which a file without biases has no place" in refused.err
