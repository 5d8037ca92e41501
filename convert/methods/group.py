"""Which KV heads become one: neighbours, or those that lose least together.

The cost of a group is the exact energy that merging it loses (``convert.planes``), keys as a share
of all key energy plus values as a share of all value energy. Cosine similarity of raw heads would
say nothing: each head has its own basis.
"""

from __future__ import annotations

from itertools import combinations, product

import networkx
import torch
from torch import Tensor

from convert.methods.merge import Moments
from convert.planes import key_covariance, real_covariance, split

__all__ = ["adjacent", "similar"]

Group = tuple[int, ...]
# of costs, which are shares: no swap for less, so that rounding cannot turn the search in circles
_MARGIN = 1e-9


def adjacent(heads: int, groups: int, layers: int = 1) -> list[Group]:
    """Neighbouring heads, as the published conversions group them: by their place in each layer."""
    size = heads // groups
    return [
        tuple(
            layer * heads + head for layer in range(layers) for head in range(start, start + size)
        )
        for start in range(0, heads, size)
    ]


def similar(moments: Moments, groups: int) -> list[Group]:
    """Groups with little lost energy, with equally many members of every layer.

    Within a layer, pairs come from a minimum-weight perfect matching, which is exact; groups of
    four, eight, ... from matching those groups again. The groups of a further layer join those of
    the layers before it by a minimum-weight assignment. Then members are swapped while that helps.
    Of this and the neighbours, improved likewise, the better is taken.

    Args:
        moments: What merging needs to know of the unit.
        groups: Their number; divides the number of KV heads.

    Returns:
        The groups in order of their first member, members in order.
    """
    cost = _Cost(moments)
    heads = moments.geometry.kv_heads
    layers = len(moments.key) // heads
    starts = [adjacent(heads, groups, layers)]
    if (heads // groups).bit_count() == 1:
        starts.append(_matched(cost, range(heads), groups))
        for layer in range(1, layers):
            joining = _matched(cost, range(layer * heads, (layer + 1) * heads), groups)
            starts[-1] = _assigned(cost, starts[-1], joining)
    found = [_swapped(cost, start, heads) for start in starts]
    best = min(found, key=lambda candidate: sum(cost(group) for group in candidate))
    return sorted(best)


class _Cost:
    """Lost energy of groups, each computed once."""

    def __init__(self, moments: Moments) -> None:
        turning, rest = split(moments.key, moments.planes)
        self._turning = key_covariance(turning, moments.query_energy, moments.moment)
        self._rest = real_covariance(rest, moments.query_metric, moments.moment)
        self._value = real_covariance(moments.value, moments.output_metric, moments.moment)
        diagonal = self._turning.diagonal(dim1=1, dim2=2).real
        self._keys = float(diagonal.sum()) + _trace(self._rest)
        self._values = _trace(self._value)
        self._known: dict[Group, float] = {}

    def __call__(self, group: Group) -> float:
        """Lost share of the key energy plus lost share of the value energy."""
        group = tuple(sorted(group))
        if group not in self._known:
            members = list(group)
            block = self._turning[:, members][:, :, members]
            lost = float(torch.linalg.eigvalsh(block)[:, :-1].sum())
            keys = lost + _lost(self._rest, members)
            self._known[group] = _share(keys, self._keys) + _share(
                _lost(self._value, members), self._values
            )
        return self._known[group]


def _matched(cost: _Cost, members: range, groups: int) -> list[Group]:
    parts: list[Group] = [(member,) for member in members]
    while len(parts) > groups:
        graph = networkx.Graph()
        for a, b in combinations(range(len(parts)), 2):
            graph.add_edge(a, b, weight=cost(parts[a] + parts[b]))
        pairs = networkx.min_weight_matching(graph)
        parts = sorted(tuple(sorted(parts[a] + parts[b])) for a, b in pairs)
    return parts


def _assigned(cost: _Cost, parts: list[Group], joining: list[Group]) -> list[Group]:
    """Add each of the joining groups to one of the parts."""
    graph = networkx.Graph()
    count = len(parts)
    for a, b in product(range(count), range(count)):
        graph.add_edge(a, count + b, weight=cost(parts[a] + joining[b]))
    pairs = [sorted(pair) for pair in networkx.min_weight_matching(graph)]
    return sorted(parts[a] + joining[b - count] for a, b in pairs)


def _swapped(cost: _Cost, start: list[Group], heads: int) -> list[Group]:
    """Swap members of two groups, of the same layer, as long as that loses less."""
    parts = list(start)
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(len(parts)), 2):
            swaps = [
                (_replaced(parts[a], left, right), _replaced(parts[b], right, left))
                for left in parts[a]
                for right in parts[b]
                if left // heads == right // heads
            ]
            best = min(swaps, key=lambda pair: cost(pair[0]) + cost(pair[1]))
            now = cost(parts[a]) + cost(parts[b])
            if cost(best[0]) + cost(best[1]) < now - _MARGIN:
                parts[a], parts[b] = best
                improved = True
    return parts


def _replaced(group: Group, old: int, new: int) -> Group:
    return tuple(sorted((*(member for member in group if member != old), new)))


def _lost(covariance: Tensor, members: list[int]) -> float:
    """Energy beyond the best block of one member's width; covariance is [n, N, n, N]."""
    width = covariance.shape[1]
    if not width:
        return 0.0
    block = covariance[members][:, :, members].reshape(len(members) * width, -1)
    return float(torch.linalg.eigvalsh(block)[:-width].sum())


def _trace(covariance: Tensor) -> float:
    return float(torch.einsum("nana->", covariance))


def _share(lost: float, total: float) -> float:
    return lost / total if total > 0 else 0.0
