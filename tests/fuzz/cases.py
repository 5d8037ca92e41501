"""Cases: from a number alone, which checkpoint, which way, and what is wrong with it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.bases import BASES, WAYS, Bases, link_folder
from tests.fuzz.draft import Draft, Mutation
from tests.fuzz.in_config import CONFIG
from tests.fuzz.in_files import FILES, INDEXES, SIDE_FILES
from tests.fuzz.in_recipe import RECIPES, TEXTS
from tests.fuzz.in_tensors import TENSORS

__all__ = ["Case", "draw", "laid_out"]

# how often something of each kind is drawn
_KINDS = (
    (CONFIG, 36),
    (TENSORS, 22),
    (FILES, 8),
    (INDEXES, 6),
    (SIDE_FILES, 8),
    (RECIPES, 14),
    (TEXTS, 6),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A case before its files are written.

    Args:
        seed: Its number.
        base: Name of the sound checkpoint.
        way: Name of the conversion.
        mutations: What is changed, in order.
        earlier: Whether a result stands at the output, to be replaced.
    """

    seed: int
    base: str
    way: str
    mutations: tuple[Mutation, ...]
    earlier: bool


def draw(seed: int) -> Case:
    """The case of a number; bases and ways take turns, so that each meets each."""
    random = Random(seed)
    kinds, weights = zip(*_KINDS, strict=True)
    count = random.choice((1, 1, 1, 2, 2, 3))
    chosen = [random.choice(kind) for kind in random.choices(kinds, weights, k=count)]
    return Case(
        seed,
        BASES[seed % len(BASES)],
        tuple(WAYS)[seed // len(BASES) % len(WAYS)],
        tuple(sorted(chosen, key=lambda mutation: mutation.stage)),
        random.random() < 0.15,
    )


def laid_out(case: Case, bases: Bases, folder: Path) -> tuple[Draft, list[str]]:
    """Write the files of a case.

    Args:
        case: From ``draw``.
        bases: What it starts from.
        folder: Empty; it gets the checkpoint ``source``, the text, and perhaps ``work/out``.

    Returns:
        The case after its mutations, with paths that are relative to the folder in its recipe; and
        what was done, in words.
    """
    random = Random(-1 - case.seed)
    link_folder(bases.sources[case.base], folder / "source")
    (folder / "work").mkdir()
    text = folder / "text.txt"
    shutil.copyfile(bases.text, text)
    recipe = {"source": "source", "output": "work/out", **WAYS[case.way]}
    if case.earlier:
        link_folder(bases.earlier, folder / "work" / "out")
        recipe["overwrite"] = True
    draft = Draft(folder / "source", recipe, text)
    return draft, [mutation.apply(draft, random) for mutation in case.mutations]
