"""Rotary frequencies: those of a source's planes, and the config.json that gives a selection.

DeepSeek's class has one frequency for each pair of its rotary key. The pairs of a conversion come
from any planes of the source, several from the same one or none, which no base describes; the
``longrope`` kind of transformers takes the frequencies as a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.facts import ModelFacts
from convert.layer import Rope
from kvpatch.errors import InputModelError

__all__ = ["RopeTable", "rope_keys", "rope_problem", "rope_table", "switching_length"]

_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_TOLERANCE = 2.0**-19  # of frequencies in float32 on a common grid, relative


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTable:
    """Frequencies of the P planes of a source.

    Args:
        rope: Positions of the layers that rotate.
        short: Radians per token, [P].
        long: The same in sequences longer than ``original`` tokens.
        original: See ``long``.
        attention_factor: Factor on the cosines and sines.
    """

    rope: Rope
    short: Tensor
    long: Tensor
    original: int
    attention_factor: float


def rope_problem(facts: ModelFacts) -> str | None:
    """Why the frequencies of a model are not one list of numbers; None if they are."""
    ropes = _rotating(facts)
    if not ropes:
        return "no layer has rotary positions"
    if len(ropes) > 1:
        return "its layers rotate with different frequencies"
    (rope,) = ropes
    if rope.kind not in _KINDS:
        return f"its rotary positions are of kind {rope.kind!r}, which no list of frequencies holds"
    return f"{rope.dim} of its dims rotate, an odd number" if rope.dim % 2 else None


def _rotating(facts: ModelFacts) -> set[Rope]:
    return {rope for rope in facts.ropes if rope.dim}


def rope_table(facts: ModelFacts, stock: Any, number: int | None = None) -> RopeTable:
    """Frequencies as transformers computes them.

    Args:
        facts: The source.
        stock: Its configuration object of transformers.
        number: The layer, one that rotates; None for a model without a ``rope_problem``, of whose
            layers all that rotate do so alike.

    Raises:
        InputModelError: If config.json gives frequencies for another number of planes.
    """
    (rope,) = _rotating(facts) if number is None else (facts.ropes[number],)
    planes, original, factor = rope.dim // 2, facts.context, 1.0
    if rope.kind == "default":
        exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
        short = long = 1.0 / rope.theta**exponents
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

        own = {} if number is None else _own_table(stock, number)
        short, factor = ROPE_INIT_FUNCTIONS[rope.kind](stock, "cpu", **own)
        long = short
        if rope.kind == "longrope":
            parameters = stock.rope_parameters[own["layer_type"]] if own else stock.rope_parameters
            original = int(parameters["original_max_position_embeddings"])
            long, _ = ROPE_INIT_FUNCTIONS[rope.kind](stock, "cpu", seq_len=original + 1, **own)
    for frequencies in (short, long):
        if len(frequencies) != planes:
            raise InputModelError(
                f"config.json gives {len(frequencies)} rotary frequencies for {planes} planes"
            )
    return RopeTable(
        rope=rope, short=short, long=long, original=original, attention_factor=float(factor)
    )


def switching_length(facts: ModelFacts, stock: Any) -> int | None:
    """Tokens beyond which a model has other frequencies; None if it has the same for all lengths.

    Keys that were cached before stay as they were turned, unless its class computes them anew.

    Args:
        facts: The source.
        stock: Its configuration object of transformers.
    """
    lengths = {
        rope: _switch(rope, facts, stock, number)
        for number, rope in enumerate(facts.ropes)
        if rope.dim
    }
    return min((length for length in lengths.values() if length is not None), default=None)


def _switch(rope: Rope, facts: ModelFacts, stock: Any, number: int) -> int | None:
    if rope.kind == "dynamic":
        return facts.context
    if rope.kind != "longrope":
        return None
    table = rope_table(facts, stock, number)
    return None if torch.equal(table.short, table.long) else table.original


def _own_table(stock: Any, number: int) -> dict[str, str]:
    """What names the table of a layer, where layers of different kinds have their own."""
    kinds = getattr(stock, "layer_types", None)
    return {"layer_type": kinds[number]} if kinds and kinds[number] in stock.rope_parameters else {}


def rope_keys(table: RopeTable, planes: Sequence[int]) -> dict[str, Any]:
    """Config keys with which pair i has the frequency of plane ``planes[i]``.

    The kind is ``default`` where the frequencies are ``theta' ** (-i / pairs)`` for one theta',
    else ``longrope`` with the base 1, so that its lists are the inverse frequencies. The
    attention factor is not in them: the queries take its square.

    Args:
        table: Frequencies of the source.
        planes: Plane of each pair.
    """
    order = torch.tensor(planes)
    short, long = table.short[order].double(), table.long[order].double()
    theta = _grid_base(table, planes, short, long)
    if theta is not None:
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        return {"rope_theta": theta, "rope_parameters": parameters}
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "short_factor": short.reciprocal().tolist(),
            "long_factor": long.reciprocal().tolist(),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": table.original,
        }
    }


def _grid_base(
    table: RopeTable, planes: Sequence[int], short: Tensor, long: Tensor
) -> float | None:
    """The base theta' on whose grid the frequencies [pairs] lie in order; None if on none."""
    pairs = len(planes)
    stride = planes[1] - planes[0] if pairs > 1 else 1
    if stride < 1 or list(planes) != list(range(0, stride * pairs, stride)):
        return None
    theta = table.rope.theta ** (2 * pairs * stride / table.rope.dim)
    grid = theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    near = [bool(((f / grid - 1).abs() <= _TOLERANCE).all()) for f in (short, long)]
    return theta if all(near) else None
