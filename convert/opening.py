"""Opening a model: one rule, for all commands, for what a checkpoint holds.

Where the tensors and config.json leave room, the stock class is the judge: what transformers would
load is the model, what it would not read is left out, and what it would fill with random numbers is
refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from convert.adapters import AdapterChoice, chosen_adapter, merged
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.safetensors_header import TensorInfo
from convert.checkpoint.sidecars import tokenizer_folder
from convert.config_keys import refuse_settings
from convert.facts import (
    ModelFacts,
    Problem,
    check_shapes,
    contradiction,
    has_latents,
    read_facts,
    with_stored_dtype,
)
from convert.families.naming import (
    canonical_names,
    is_buffer,
    layer_and_rest,
    refuse_foreign_names,
)
from convert.hub import Source
from convert.latent_source import LatentSource, latent_source
from convert.stock import StockTensors, stock_tensors
from convert.tokenizer_files import tokenizer_warnings
from kvpatch.errors import InputModelError

__all__ = ["OpenModel", "open_model", "refuse_latents"]

_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TIED = "tie_word_embeddings"
_SHOWN = 3
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A checkpoint that is a model which kvpatch knows.

    Args:
        checkpoint: Open; its tensors are those of the model, by the names of the family table, and
            its config says whether the embeddings are one.
        facts: Its attention. For models with latents, everything but that.
        latents: Its latents, if it has any.
        buffers: Masks and tables that are stored and left out.
        left_out: Other tensors that its class does not read.
        renamed: Whether transformers itself would miss tensors, by the names that they have.
        imported: Whether transformers was asked for the tensors of its class.
        merged: Whether an adapter is merged into what is read.
        warnings: What the user should know.
    """

    checkpoint: Checkpoint
    facts: ModelFacts
    latents: LatentSource | None
    buffers: tuple[TensorInfo, ...]
    left_out: tuple[TensorInfo, ...]
    renamed: bool
    imported: bool
    merged: bool
    warnings: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Of the input embedding."""
        return self.checkpoint.tensors[self.facts.family.embedding].shape[0]


@contextmanager
def open_model(
    source: Source,
    *,
    adapter: AdapterChoice | None = None,
    latents: bool = False,
    allow_pickle: bool = False,
) -> Iterator[OpenModel]:
    """Open a checkpoint and say what model it is, from config.json and headers.

    Only where config.json ties two embeddings that are both stored, these are read and compared.

    Args:
        source: The checkpoint, with its base if it is an adapter alone.
        adapter: What is to be done with an adapter in it.
        latents: Whether it may cache latents already.
        allow_pickle: Read ``.bin`` files too, with ``weights_only``.

    Raises:
        UsageError: If there is an adapter beside the weights and no choice, or one alone that is
            to be ignored.
        UnsupportedModelError: If kvpatch does not know models of its kind.
        InputModelError: If files are damaged, or config.json and tensors contradict each other.
    """
    found = chosen_adapter(source, adapter, allow_pickle=allow_pickle)
    base = source.base or source
    with Checkpoint(base.path, allow_pickle=allow_pickle, sizes=base.sizes) as stored:
        refuse_settings(stored.config)
        held = _latents(stored, wanted=latents)
        facts = _facts(stored) if held is None else held.facts
        family = facts.family
        refuse_foreign_names(stored.tensors, family.heads, tied=facts.tied)
        warnings = list(stored.warnings)
        renamed, buffers = _named(stored, facts, warnings)
        checkpoint = stored if found is None else merged(stored, found, family)
        tied = _tied(checkpoint, facts, headers_alone=base.sizes is not None, warnings=warnings)
        if tied != facts.tied:  # which only ever becomes false
            checkpoint.config = {**checkpoint.config, _TIED: tied}
            held = _latents(checkpoint, wanted=latents)
            facts = dataclasses.replace(facts, tied=tied)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        check_shapes(facts if held is None else held.plan_facts, shapes)
        stock = stock_tensors(
            checkpoint.config, facts if held is None else None, shapes, heads=family.heads
        )
        _refuse_missing(stock, shapes, facts)
        _refuse_integers(checkpoint, stock)
        left_out = _leave_out(checkpoint, stock, facts, warnings)
        tokenizer = tokenizer_folder(source.folders)
        yield OpenModel(
            checkpoint=checkpoint,
            facts=facts,
            latents=held,
            buffers=buffers,
            left_out=left_out,
            renamed=renamed,
            imported=stock.imported or held is not None,
            merged=found is not None,
            warnings=(*warnings, *tokenizer_warnings(tokenizer, shapes[family.embedding][0])),
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


def _named(
    checkpoint: Checkpoint, facts: ModelFacts, warnings: list[str]
) -> tuple[bool, tuple[TensorInfo, ...]]:
    """Give tensors the names of the family table, and leave old buffers out.

    Returns:
        Whether transformers would not find all of them by the names on disk, and the buffers.
    """
    family = facts.family
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
    if facts.tied and family.embedding not in names.values():  # the head alone serves as both
        names = {
            old: family.embedding if own in family.heads else own for old, own in names.items()
        }
    buffers = {old for old, own in names.items() if is_buffer(own, family)}
    infos = tuple(checkpoint.tensors[name] for name in names if name in buffers)
    checkpoint.rename({old: own for old, own in names.items() if old not in buffers})
    return bool(foreign), infos


def _refuse_integers(checkpoint: Checkpoint, stock: StockTensors) -> None:
    """Refuse weights that are stored as integers, or in eight bits."""
    for name, info in checkpoint.tensors.items():
        if name in stock.shapes and info.dtype not in _WEIGHTS:
            raise InputModelError(
                f"{info.file}: {info.name!r} has dtype {info.dtype}: the weights are quantised",
                hint="Convert the unquantised checkpoint and quantise the result.",
            )


def _tied(
    checkpoint: Checkpoint, facts: ModelFacts, *, headers_alone: bool, warnings: list[str]
) -> bool:
    """Whether input and output embedding are one, as transformers decides it.

    config.json alone does not say it: where both are stored and differ, they are not tied.
    """
    family = facts.family
    head = next((name for name in family.heads if name in checkpoint.tensors), None)
    if not facts.tied or head is None:
        return facts.tied
    if family.embedding not in checkpoint.tensors:
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
    problems: list[Problem] = [
        (name, shape, shapes.get(name))
        for name, shape in stock.shapes.items()
        if shapes.get(name, shape if name in unneeded else None) != shape
    ]
    # transformers stacks all experts that are stored, which no class then takes
    problems += [
        (name, "no such expert", shape)
        for name, shape in shapes.items()
        if name not in stock.shapes and _EXPERT.sub(".experts.0.", name) in stock.shapes
    ]
    if problems:
        raise contradiction(problems)


def _leave_out(
    checkpoint: Checkpoint, stock: StockTensors, facts: ModelFacts, warnings: list[str]
) -> tuple[TensorInfo, ...]:
    """Leave out what the class does not read, and give it back."""
    read = stock.shapes.keys() | stock.buffers.keys()
    others = {name: info for name, info in checkpoint.tensors.items() if name not in read}
    if others:
        checkpoint.rename({name: name for name in checkpoint.tensors if name not in others})
        warnings.append(_unread(others, facts))
    return tuple(others.values())


def _unread(names: Collection[str], facts: ModelFacts) -> str:
    shown = ", ".join(f"{name!r:.100}" for name in list(names)[:_SHOWN])
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
