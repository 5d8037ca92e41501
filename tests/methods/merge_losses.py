"""Units of layers, and the energy that merging their heads loses, measured on samples.

It is measured from the layers before and after alone: on every pair of samples, what a query makes
of a key in each plane and in the dims without RoPE, and on every sample what a head adds to the
residual stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer
from tests.methods.layers import Shape, augmented, random_layer

__all__ = [
    "LOST",
    "SAMPLES",
    "SHAPES",
    "lost_keys",
    "lost_values",
    "projected",
    "random_unit",
    "ridge_moves",
    "scattered",
    "shapes",
    "silent",
]

SAMPLES = 40
Groups = Sequence[Sequence[int]]
SHAPES = {
    "partial": Shape(),
    "interleaved": Shape(interleaved=True, biases=("q", "k", "v", "o")),
    "full": Shape(rope_dim=6, biases=("k",)),
    "none": Shape(rope_dim=0, biases=("q", "v")),
    "one reader": Shape(group=1, head_dim=4, rope_dim=4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def random_unit(shape: Shape, count: int, *, seed: int) -> list[AttentionLayer]:
    return [random_layer(shape, seed=seed + layer) for layer in range(count)]


def scattered(shape: Shape, count: int) -> list[tuple[int, ...]]:
    """Two groups with equally many members of every layer, none of them neighbours."""
    even = range(0, count * shape.kv_heads, 2)
    return [tuple(even), tuple(member + 1 for member in even)]


def projected(layer: AttentionLayer, part: str, rows: Tensor) -> Tensor:
    """[n, T, D] of inputs [T, E]."""
    heads = torch.einsum("hde,te->htd", getattr(layer, part), rows)
    bias = getattr(layer, f"{part}_bias")
    return heads if bias is None else heads + bias[:, None]


def _products(layer: AttentionLayer, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """What queries [T, D] make of keys [T, D]: complex [T, T] of each plane, and the real rest."""
    assert layer.rope is not None
    dim = layer.rope.dim
    step = 1 if layer.rope.interleaved else dim // 2
    firsts = range(0, dim, 2) if layer.rope.interleaved else range(dim // 2)

    def plane(heads: Tensor, first: int) -> Tensor:
        return torch.complex(heads[:, first], heads[:, first + step])

    turning = [torch.outer(plane(query, f), plane(key, f).conj()) for f in firsts]
    empty = query.new_zeros(0, len(query), len(key))
    planes = torch.stack(turning) if turning else torch.complex(empty, empty)
    return planes, query[:, dim:] @ key[:, dim:].T


def _readers(groups: Groups, layer: int, before: AttentionLayer) -> list[tuple[int, int, int]]:
    """(member, its query head before, its query head after) of every query head of a layer."""
    heads, size = before.geometry.kv_heads, before.geometry.group
    members = [m for group in groups for m in group if m // heads == layer]
    return [
        (member, member % heads * size + reader, place * size + reader)
        for place, member in enumerate(members)
        for reader in range(size)
    ]


def lost_keys(
    before: Sequence[AttentionLayer],
    after: Sequence[AttentionLayer],
    groups: Groups,
    samples: Sequence[Tensor],
) -> Tensor:
    """Energy [M] of the keys of each member that queries no longer find."""
    size = before[0].geometry.kv_heads
    lost = torch.zeros(len(before) * size, dtype=torch.float64)
    new_keys = projected(after[0], "k", samples[0])
    for index, (old, new, rows) in enumerate(zip(before, after, samples, strict=True)):
        keys, queries = (projected(old, part, rows) for part in "kq")
        new_queries = projected(new, "q", rows)
        for member, head, place in _readers(groups, index, old):
            slot = place // (old.geometry.heads // len(groups))
            planes, rest = _products(old, queries[head], keys[member % size])
            new_planes, new_rest = _products(old, new_queries[place], new_keys[slot])
            lost[member] += (planes - new_planes).abs().square().mean((1, 2)).sum()
            lost[member] += (rest - new_rest).square().mean()
    return lost


def lost_values(
    before: Sequence[AttentionLayer],
    after: Sequence[AttentionLayer],
    groups: Groups,
    samples: Sequence[Tensor],
) -> Tensor:
    """Energy [M] of what each member adds to the residual stream and no longer does."""
    size = before[0].geometry.kv_heads
    lost = torch.zeros(len(before) * size, dtype=torch.float64)
    new_values = projected(after[0], "v", samples[0])
    for index, (old, new, rows) in enumerate(zip(before, after, samples, strict=True)):
        values = projected(old, "v", rows)
        assert old.o is not None
        assert new.o is not None
        for member, head, place in _readers(groups, index, old):
            slot = place // (old.geometry.heads // len(groups))
            added = values[member % size] @ old.o[:, head].T
            lost[member] += (added - new_values[slot] @ new.o[:, place].T).square().sum(1).mean()
    return lost


LOST = {"k": lost_keys, "v": lost_values}


def silent(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """The layers with no queries and no output, which lose everything."""
    return [
        dataclasses.replace(layer, q=0 * layer.q, q_bias=None, o=0 * layer.o) for layer in layers
    ]


def ridge_moves(samples: Sequence[Tensor]) -> float:
    """Bound on the share of the energy by which the ridge r moves predicted from measured loss.

    With rows P that predict and rows W that were merged they differ by ``2 r P W^T``; neither has
    more than all the energy, which is at least the smallest eigenvalue of the moment times P^2.
    """
    rows = augmented(samples[0])
    moment = rows.T @ rows / len(rows)
    ridge = 1e-6 * float(moment.diagonal().mean())
    return 2 * ridge / float(torch.linalg.eigvalsh(moment)[0])
