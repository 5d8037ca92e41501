"""Small random layers in float64, and inputs of theirs with the moments they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from convert.layer import AttentionLayer, Geometry, Rope
from convert.methods.attention import Scoring
from convert.methods.merge import Inputs

__all__ = [
    "Shape",
    "augmented",
    "causal",
    "correlated",
    "inputs_of",
    "one_by_one",
    "partitions",
    "randn",
    "random_layer",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a layer, its rotation, and which of its projections have biases."""

    kv_heads: int = 4
    group: int = 2
    head_dim: int = 6
    value_dim: int = 3
    hidden: int = 7
    rope_dim: int = 4
    interleaved: bool = False
    biases: Sequence[str] = ()


def randn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_layer(shape: Shape, *, seed: int) -> AttentionLayer:
    """A layer with random weights; heads differ in size, so that no two weigh alike."""
    heads = shape.kv_heads * shape.group
    sizes = {
        "q": (heads, shape.head_dim),
        "k": (shape.kv_heads, shape.head_dim),
        "v": (shape.kv_heads, shape.value_dim),
    }
    fields = {
        name: randn(*size, shape.hidden, seed=10 * seed + place)
        * (1 + randn(size[0], 1, 1, seed=10 * seed + place + 100)).abs()
        for place, (name, size) in enumerate(sizes.items())
    }
    fields["o"] = randn(shape.hidden, heads, shape.value_dim, seed=10 * seed + 3)
    sizes["o"] = (shape.hidden,)
    for place, name in enumerate(shape.biases):
        fields[f"{name}_bias"] = randn(*sizes[name], seed=10 * seed + 4 + place)
    return AttentionLayer(
        geometry=Geometry(
            hidden=shape.hidden,
            heads=heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
        ),
        rope=Rope(dim=shape.rope_dim, interleaved=shape.interleaved, theta=1e4),
        **fields,
    )


def correlated(layers: int, samples: int, hidden: int, *, seed: int) -> list[Tensor]:
    """Inputs [samples, E] of each layer: a mixture of the previous layer's and of news.

    Each has a mean of its own, and directions of very different power.
    """
    inputs = [randn(samples, hidden, seed=seed)]
    for layer in range(1, layers):
        mixture = randn(hidden, hidden, seed=seed + 100 * layer) / hidden**0.5
        news = randn(samples, hidden, seed=seed + 100 * layer + 1)
        inputs.append(inputs[-1] @ mixture + 0.4 * news)
    scales = torch.linspace(0.2, 2, hidden, dtype=torch.float64)
    return [rows * scales + randn(hidden, seed=seed + 7) for rows in inputs]


def augmented(rows: Tensor) -> Tensor:
    """``[x; 1]`` for inputs x [..., E]."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def inputs_of(samples: Sequence[Tensor]) -> Inputs:
    """The second moments of inputs [n, E] of each layer."""
    rows = [augmented(part) for part in samples]
    return Inputs(
        tuple(part.T @ part / len(part) for part in rows),
        tuple(part.T @ rows[0] / len(part) for part in rows),
    )


def causal(tokens: int, planes: int, *, window: int | None = None, **options: Any) -> Scoring:
    """Scoring of a causal layer, a window wide, with some frequencies and a scale of its own."""
    place = torch.arange(tokens)
    distance = place[:, None] - place
    angle = place[:, None] * 0.7 ** torch.arange(planes, dtype=torch.float64)
    return Scoring(
        visible=(distance >= 0) & (distance < (window or tokens)),
        turn=torch.polar(torch.ones_like(angle), angle),
        scale=0.37,
        **options,
    )


def partitions(members: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to part members into groups of one size."""
    if not members:
        yield []
        return
    first, *others = members
    for mates in combinations(others, size - 1):
        left = tuple(m for m in others if m not in mates)
        for rest in partitions(left, size):
            yield [(first, *mates), *rest]


def one_by_one(function: Callable[[int], None], numbers: range) -> None:
    """Work on numbers in their order, in this thread."""
    for number in numbers:
        function(number)
