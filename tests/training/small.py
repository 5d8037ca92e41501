"""Tiny checkpoints, texts and the command line for the tests of uptraining."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.families.stock import make
from tests.families.texts import random_text, token_ids, write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import Run, cli
from tests.helpers import load_folder

__all__ = ["FLAGS", "Place", "weights"]

FLAGS = ("--tokens", "512", "--batch", "2", "--context", "16", "--device", "cpu", "--quiet")
_KINDS: dict[str, tuple[str, ...]] = {
    "gqa": ("gqa", "--kv-heads", "2"),
    "mqa": ("mqa",),
    "cla": ("cla", "--share", "2"),
    "mla": (
        *("mla", "--rank", "24", "--rope-dims", "8"),
        "--target=kvpatch",
        "--rope-select=stride",
    ),
}


class Place:
    """Makes each checkpoint and text once, in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text = root / "train.txt"
        lines = [random_text(20 + seed % 23, seed=seed) for seed in range(200)]
        self.text.write_text("\n".join(lines).replace("\n", ""))
        self.held = root / "held.jsonl"
        rows = [json.dumps({"text": random_text(30, seed=1000 + seed)}) for seed in range(12)]
        self.held.write_text("\n".join(rows))
        self.source = cache(self._source)
        self.converted = cache(self._converted)

    def _source(self, name: str = "llama") -> Path:
        folder = self.root / name.replace(":", "-")
        wide = {"hidden_size": 64, "head_dim": 16} if name == "llama" else {}
        torch.manual_seed(7)
        make(name, settings(name) | wide).save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    def _converted(self, kind: str, name: str = "llama") -> Path:
        out = self.root / f"{name.replace(':', '-')}-{kind}"
        command, *flags = _KINDS[kind]
        run = cli([command, str(self.source(name)), str(out), "-q", *flags])
        assert run.code == 0, run.err
        return out

    def arguments(self, start: Path, out: Path, *flags: object, name: str = "llama") -> list[str]:
        """Of ``kvpatch uptrain``."""
        base = ["uptrain", str(start), str(out), "--data", str(self.text)]
        return [*base, "--teacher", str(self.source(name)), *FLAGS, *map(str, flags)]

    @property
    def measured(self) -> tuple[str, ...]:
        """Flags with which ``distance`` is measured in a run."""
        return ("--eval-text", str(self.held), "--context", "31", "--eval-samples", "12")

    def distance(self, folder: Path, source: Path) -> float:
        """KL to a source in nats, both models run on each document alone."""
        stream = "".join(json.loads(row)["text"] for row in self.held.read_text().splitlines())
        # 12 documents of 30 characters, in 11 whole sequences of 31
        edges = sorted({*range(0, 11 * 31 + 1, 31), *range(0, 11 * 31, 30)})
        models = [load_folder(path) for path in (folder, source)]
        losses = []
        for begin, end in pairwise(edges):
            if end - begin > 1:
                ids = token_ids(stream[begin:end])[None]
                with torch.no_grad():
                    ours, theirs = (m(ids).logits[0, :-1].log_softmax(-1) for m in models)
                losses.append((theirs.exp() * (theirs - ours)).sum(-1))
        return float(torch.cat(losses).mean())

    def uptrain(self, start: Path, out: Path, *flags: object, name: str = "llama") -> Run:
        """Run ``kvpatch uptrain`` in this process."""
        return cli(self.arguments(start, out, *flags, name=name))


def weights(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
