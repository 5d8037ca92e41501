"""Tiny models and the command line for the tests of ``kvpatch mla``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.families.stock import make
from tests.families.texts import write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import Run, cli

__all__ = ["SMALL", "Source", "done", "mla", "sources"]

# KV values of a token and layer: 2 x 4 x 16
_WIDTH = {"hidden_size": 64, "head_dim": 16}
SMALL = ("--rank", "24", "--rope-dims", "8")
Source = Callable[..., Path]


def sources(root: Path) -> Source:
    """Makes each tiny model once, in a folder of its own; ``wide`` is one that servers can load."""

    @cache
    def saved(name: str) -> Path:
        folder = root / name.replace(":", "-")
        if name == "wide":
            wide = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 1}
            make("llama", settings("llama") | wide).double().save_pretrained(folder)
        else:
            more = _WIDTH if name == "llama" else {}
            make(name, settings(name) | more).save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return saved


def mla(source: Path, out: Path, *flags: object) -> Run:
    return cli(["mla", str(source), str(out), *map(str, flags)])


def done(source: Path, out: Path, *flags: object) -> Path:
    run = mla(source, out, *flags)
    assert run.code == 0, run.err
    assert run.out == f"{out}\n"
    return out
