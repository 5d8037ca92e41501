"""Opening a model: one rule, for all commands, for what a checkpoint holds.

Where the tensors and config.json leave room, the stock class is the judge: what transformers would
load is the model, what it would not read is left out, and what it would fill with random numbers is
refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.checkpoint.reader import Checkpoint
from convert.facts import (
    ModelFacts,
    check_shapes,
    contradiction,
    has_latents,
    read_facts,
    with_stored_dtype,
)
from convert.families import Family
from convert.families.naming import (
    canonical_names,
    is_buffer,
    layer_and_rest,
    refuse_foreign_names,
)
from convert.latent_source import LatentSource, latent_source
from convert.stock import StockTensors, stock_tensors
from convert.tokenizer_files import tokenizer_warnings
from kvpatch.errors import InputModelError

__all__ = ["OpenModel", "open_model", "refuse_latents"]

_QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
_TIED = "tie_word_embeddings"
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A checkpoint that is a model which kvpatch knows.

    Args:
        checkpoint: Open; its tensors are those of the model, by the names of the family table, and
            its config says whether the embeddings are one.
        facts: Its attention. For models with latents, everything but that.
        latents: Its latents, if it has any.
        left_out: Names on disk of tensors that its class does not read, other than old buffers.
        renamed: Whether transformers itself would miss tensors, by the names that they have.
        imported: Whether transformers was asked for the tensors of its class.
        warnings: What the user should know.
    """

    checkpoint: Checkpoint
    facts: ModelFacts
    latents: LatentSource | None
    left_out: tuple[str, ...]
    renamed: bool
    imported: bool
    warnings: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Of the input embedding."""
        return self.checkpoint.tensors[self.facts.family.embedding].shape[0]


@contextmanager
def open_model(
    folder: Path,
    *,
    latents: bool = False,
    allow_pickle: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> Iterator[OpenModel]:
    """Open a checkpoint and say what model it is, from config.json and headers.

    Only where config.json ties two embeddings that are both stored, these are read and compared.

    Args:
        folder: The checkpoint.
        latents: Whether it may cache latents already.
        allow_pickle: Read ``.bin`` files too, with ``weights_only``.
        sizes: Bytes of each weight file, where only its header is there.

    Raises:
        InputModelError: If files are damaged, the model is of an unknown kind, or config.json and
            tensors contradict each other.
    """
    with Checkpoint(folder, allow_pickle=allow_pickle, sizes=sizes) as checkpoint:
        source = _latents(checkpoint, wanted=latents)
        facts = _facts(checkpoint) if source is None else source.facts
        family = facts.family
        refuse_foreign_names(checkpoint.tensors, family.heads)
        warnings = list(checkpoint.warnings)
        renamed = _named(checkpoint, family, warnings)
        _refuse_quantised(checkpoint)
        tied = _tied(checkpoint, facts, headers_alone=sizes is not None, warnings=warnings)
        if tied != facts.tied:  # which only ever becomes false
            checkpoint.config = {**checkpoint.config, _TIED: tied}
            source = _latents(checkpoint, wanted=latents)
            facts = dataclasses.replace(facts, tied=tied)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        check_shapes(facts if source is None else source.plan_facts, shapes)
        stock = stock_tensors(
            checkpoint.config, facts if source is None else None, shapes, heads=family.heads
        )
        _refuse_missing(stock, shapes, facts)
        left_out = _leave_out(checkpoint, stock, facts, warnings)
        warnings += tokenizer_warnings(folder, shapes[family.embedding][0])
        yield OpenModel(
            checkpoint=checkpoint,
            facts=facts,
            latents=source,
            left_out=left_out,
            renamed=renamed,
            imported=stock.imported or source is not None,
            warnings=tuple(warnings),
        )


def refuse_latents(config: Mapping[str, Any]) -> None:
    """Refuse a model that caches latents already.

    Raises:
        InputModelError: If it does.
    """
    if has_latents(config):
        raise InputModelError(
            f"{config.get('model_type')} caches a latent already (MLA)",
            hint="Of a conversion README.md says what it caches; kvpatch verify checks it.",
        )


def _latents(checkpoint: Checkpoint, *, wanted: bool) -> LatentSource | None:
    if not wanted:
        refuse_latents(checkpoint.config)
        return None
    return latent_source(checkpoint) if has_latents(checkpoint.config) else None


def _facts(checkpoint: Checkpoint) -> ModelFacts:
    dtypes = (info.dtype for info in checkpoint.tensors.values())
    return with_stored_dtype(read_facts(checkpoint.config), dtypes)


def _named(checkpoint: Checkpoint, family: Family, warnings: list[str]) -> bool:
    """Give tensors the names of the family table, and leave old buffers out.

    Returns:
        Whether transformers would not find all of them by the names on disk.
    """
    names = canonical_names(checkpoint.tensors, family)
    bare = {own.removeprefix(family.base) for own in names.values()}
    # transformers adds or removes the prefix of the base model by itself
    foreign = [old for old, own in names.items() if old != own and old not in bare]
    if foreign:
        old = foreign[0]
        warnings.append(
            f"tensors have the names of a wrapper: {old!r} is read as {names[old]!r}, the others "
            "likewise"
        )
    checkpoint.rename({old: own for old, own in names.items() if not is_buffer(own, family)})
    return bool(foreign)


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    for info in checkpoint.tensors.values():
        if info.dtype in _QUANTISED:
            raise InputModelError(
                f"{info.file}: {info.name!r} has dtype {info.dtype}: the weights are quantised",
                hint="Convert the unquantised checkpoint and quantise the result.",
            )


def _tied(
    checkpoint: Checkpoint, facts: ModelFacts, *, headers_alone: bool, warnings: list[str]
) -> bool:
    """Whether input and output embedding are one, as transformers decides it.

    config.json alone does not say it: where both are stored and differ, they are not tied; where
    only the output embedding is, it serves as both.
    """
    family = facts.family
    head = next((name for name in family.heads if name in checkpoint.tensors), None)
    if not facts.tied or head is None:
        return facts.tied
    if family.embedding not in checkpoint.tensors:
        names = {name: name for name in checkpoint.tensors}
        checkpoint.rename({**names, head: family.embedding})
        return True
    if headers_alone:
        warnings.append(
            f"{_TIED} is true and {head!r} is stored, too: whether it differs from the embedding, "
            "and is then used, shows when the weights are there"
        )
        return True
    if _equal(checkpoint, family.embedding, head):
        return True
    warnings.append(
        f"{_TIED} is true, but {head!r} is stored and differs from the embedding: as in "
        "transformers, it is the output embedding, and the result says so"
    )
    return False


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    infos = checkpoint.tensors[one], checkpoint.tensors[other]
    if len({info.shape for info in infos}) > 1:
        return False
    if len({info.dtype for info in infos}) > 1:
        return torch.equal(checkpoint.read(one).double(), checkpoint.read(other).double())
    pairs = zip(checkpoint.chunks(one), checkpoint.chunks(other), strict=True)
    dtype = infos[0].dtype
    return all(
        torch.equal(torch.frombuffer(a, dtype=dtype), torch.frombuffer(b, dtype=dtype))
        for a, b in pairs
    )


def _refuse_missing(
    stock: StockTensors, shapes: Mapping[str, tuple[int, ...]], facts: ModelFacts
) -> None:
    """Refuse a checkpoint that lacks what its class has, or has it in another shape."""
    unneeded = set(facts.family.heads) if facts.tied else set()
    problems = [
        (name, shape, shapes.get(name))
        for name, shape in stock.shapes.items()
        if shapes.get(name, shape if name in unneeded else None) != shape
    ]
    if problems:
        raise contradiction(problems)


def _leave_out(
    checkpoint: Checkpoint, stock: StockTensors, facts: ModelFacts, warnings: list[str]
) -> tuple[str, ...]:
    """Leave out what the class does not read.

    Returns:
        Names on disk.
    """
    read = stock.shapes.keys() | stock.buffers.keys()
    others = {name: info.name for name, info in checkpoint.tensors.items() if name not in read}
    if others:
        checkpoint.rename({name: name for name in checkpoint.tensors if name not in others})
        warnings.append(_unread(others, facts))
    return tuple(others.values())


def _unread(names: Collection[str], facts: ModelFacts) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    places = [layer_and_rest(name, facts.family) for name in names]
    biases = any(place is not None and place[1].endswith(".bias") for place in places)
    why = (
        "; if it was trained with these biases, config.json lacks the key that says so"
        if biases
        else ""
    )
    return (
        f"{facts.family.architecture} does not read {shown}{more}: left out, as in transformers"
        f"{why}"
    )
