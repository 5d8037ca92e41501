"""What a converted model is written as: names, layouts and config of the result, without any IO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from convert.families import Family
from convert.layer import AttentionLayer

__all__ = [
    "Constant",
    "Fold",
    "Rewrite",
    "Target",
    "keep_layer",
    "moved_parts",
]

# takes what the method made of a layer, an AttentionLayer or a LatentLayer, and its other tensors
Fold = Callable[[Any, Mapping[str, Tensor]], tuple[AttentionLayer | None, Mapping[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One tensor of the result made of one outside the converted attention.

    Args:
        name: Its name in the result.
        transform: What is done to the tensor; None where its bytes are copied. Cheap and pure, so
            that the plan can run it on a tensor without data to learn the shape.
        elementwise: Whether it maps every number by itself, so that the tensor need not be held as
            a whole. It may then give a wider dtype, to be rounded once.
    """

    name: str
    transform: Callable[[Tensor], Tensor] | None = None
    elementwise: bool = False


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of the result that the source does not have, in the dtype of the weights.

    Args:
        name: Its name in the result.
        shape: Its shape.
        value: All of its entries.
    """

    name: str
    shape: tuple[int, ...]
    value: float


def keep_layer(
    layer: AttentionLayer, _: Mapping[str, Tensor]
) -> tuple[AttentionLayer, Mapping[str, Tensor]]:
    """A layer as it is."""
    return layer, {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How a converted model is written.

    A layer of the result takes three steps, all on that layer's tensors alone: unpack with the
    source's family and convert; ``fold``; pack with ``family``. All other tensors go through
    ``rename`` one at a time, and ``constants`` are added.

    Args:
        name: ``native`` if transformers itself has the class, ``kvpatch`` if this package has it.
        model_type: Of the result's config.json.
        architecture: Class of the result.
        family: Row with which the attention of the result is packed.
        edit: The result's config.json from the source's, which is not completed with defaults.
        reads: Canonical fields that a layer needs beside those its method reads, since the result
            names or packs them differently.
        folds: Other tensors that a layer needs, named without the layer prefix of the source; a
            checkpoint need not have them all. They go to ``fold``, not to ``rename``.
        fold: Exact rewrite of a converted layer and of its ``folds`` to what the result's class
            expects. Takes ``folds`` without the source's layer prefix and gives tensors without
            that of the result. A field that is None stays None, unless the class demands it. The
            layer is None where the tensors are all of it, and ``family`` packs nothing.
        rename: Fate of every tensor that no layer takes: what it becomes, several tensors where
            the result has it in parts or twice; None where the result has no such tensor.
            Raises InputModelError on a tensor that has no place in the result.
        constants: Tensors that are added.
    """

    name: Literal["native", "kvpatch"]
    model_type: str
    architecture: str
    family: Family
    edit: Callable[[Mapping[str, Any]], dict[str, Any]]
    reads: frozenset[str] = frozenset()
    folds: tuple[str, ...] = ()
    fold: Fold = keep_layer
    rename: Callable[[str], Rewrite | tuple[Rewrite, ...] | None] = Rewrite
    constants: tuple[Constant, ...] = ()

    def rewrites(self, name: str) -> tuple[Rewrite, ...]:
        """What becomes of a tensor that no layer takes; nothing if it is dropped.

        Args:
            name: Its name in the source.

        Raises:
            InputModelError: If it has no place in the result.
        """
        fate = self.rename(name)
        if fate is None:
            return ()
        return fate if isinstance(fate, tuple) else (fate,)


def moved_parts(source: Family, result: Family) -> frozenset[str]:
    """Canonical fields whose tensors have another name or layout in the result.

    Args:
        source: Row of the source.
        result: Row with which the result is packed.
    """
    same = source.layer_prefix == result.layer_prefix
    stays = set(source.projections) & set(result.projections) if same else set()
    fields: set[str] = {part for p in source.projections if p not in stays for part in p.parts}
    norms = same and (source.q_norm, source.k_norm) == (result.q_norm, result.k_norm)
    if source.qk_norm is not None and not norms:
        fields |= {"q_norm", "k_norm"}
    return frozenset(fields)
