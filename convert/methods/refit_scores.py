"""Refitting query and key projections: the converted scores as near to the original as they get.

Near the original, the divergence of the attention row of one query is half of
``d^T (diag p - p p^T) d``, where p are the original weights and d the error of the scores. The
scores are linear in the query projection while keys stand, and in the key projection while queries
stand, so either is a least squares problem in that metric; they are solved in turn, queries first
and last. The normal equations are never formed: a product with their matrix costs two matrix
products like those of attention itself, and conjugate gradients needs a few of them.

"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convert.methods.attention import Scoring, rotate, weights
from convert.methods.least_squares import solve, total
from convert.methods.spectral import lower_root

__all__ = [
    "RIDGE",
    "STEPS",
    "Basis",
    "Reader",
    "Ruler",
    "basis_of",
    "refit_queries",
    "refit_scores",
]

# of the mean diagonal of the normal matrix, towards the merged weights
RIDGE = 1e-2
# of conjugate gradients: measured, twenty gain a seventh on the text itself, but twice as many
# windows in the same time gain more on others
STEPS = 10
# times that keys and queries are solved in turn: measured, three gain what costs half more
_ROUNDS = 1
# of the norm of the inputs' second moment: directions of a variance far below it are left alone
_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class Basis:
    """Inputs of a projection in coordinates in which they are white.

    Least squares then converges in few steps, whatever the scale of single input dims.

    Args:
        inputs: [N, T, E'] white inputs, with the constant 1 of a bias among them if there is one.
        there: [E', E'] takes rows of a projection into these coordinates.
        back: [E', E'] takes them back.
    """

    inputs: Tensor
    there: Tensor
    back: Tensor


@dataclass(slots=True)
class Reader:
    """Query heads of one layer that read one KV head, and what their scores should be.

    Args:
        basis: The inputs of their projection.
        rows: [g, D, E'] the projection, in the coordinates of ``basis``; refitted in place.
        target: [N, g, T, T] scores of the original layer, before cap, offset and mask.
        scoring: How scores become weights.
        share: How much its errors count beside those of other readers.
    """

    basis: Basis
    rows: Tensor
    target: Tensor
    scoring: Scoring
    share: float = 1.0


def basis_of(inputs: Tensor, *, bias: bool) -> Basis:
    """White coordinates of inputs [N, T, E], all but for a floor; with ``bias``, of [x; 1]."""
    if bias:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
    rows = inputs.flatten(0, -2)
    moment = (rows.mT @ rows).double() / len(rows)
    root = lower_root(moment, _FLOOR * float(moment.norm()))
    unit = torch.eye(len(root), dtype=root.dtype, device=root.device)
    back = torch.linalg.solve_triangular(root, unit, upper=False).to(inputs.dtype)
    return Basis(inputs @ back.mT, root.to(inputs.dtype), back)


def refit_queries(readers: Sequence[Reader], key: Tensor, *, seed: int) -> None:
    """Refit the query projections of all readers of one KV head, whose keys stand.

    Args:
        readers: Everything that is to be refitted; their ``rows`` are replaced.
        key: [N, T, D] rotated keys.
        seed: Of the probe that measures the scale of the ridge.
    """
    for reader in readers:
        Ruler(reader).fit_queries(key, seed)


def refit_scores(
    readers: Sequence[Reader], key_inputs: Tensor, key_rows: Tensor, *, seed: int
) -> Tensor:
    """Refit the query projections of all readers of one KV head, and its key projection.

    Args:
        readers: Everything that reads this KV head; their ``rows`` are replaced.
        key_inputs: [N, T, E'] white inputs of the key projection.
        key_rows: [D, E'] the key projection in the same coordinates.
        seed: Of the probes that measure the scale of the ridge.

    Returns:
        The new key projection.
    """
    rulers = [Ruler(reader) for reader in readers]
    turn = readers[0].scoring.turn

    def fit_queries(rows: Tensor) -> None:
        key = rotate(key_inputs @ rows.mT, turn)
        for ruler in rulers:
            ruler.fit_queries(key, seed)

    fit_queries(key_rows)
    for _ in range(_ROUNDS):
        key_rows = _fit_keys(rulers, key_inputs, key_rows, turn, seed)
        fit_queries(key_rows)
    return key_rows


class Ruler:
    """The metric in which the scores of one reader are fitted, window by window."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        scoring = reader.scoring
        self.weights = weights(reader.target, scoring)
        self.slope: Tensor | None = None
        if scoring.softcap is not None:  # how much of a change of the score the cap lets through
            self.slope = 1 - torch.tanh(reader.target / scoring.softcap).square()

    @cached_property
    def pull(self) -> Tensor:
        """The scores of the original layer [N, g, T, T] in the metric."""
        return torch.stack([self.measure(n, s) for n, s in enumerate(self.reader.target)])

    def measure(self, window: int, error: Tensor) -> Tensor:
        """``(diag p - p p^T) error`` of scores [g, T, T]."""
        if self.slope is not None:
            error = self.slope[window] * error
        weighted = self.weights[window] * error
        mean = weighted.sum(-1, keepdim=True)
        weighted = torch.addcmul(weighted, self.weights[window], mean, value=-1) * self.reader.share
        return weighted if self.slope is None else self.slope[window] * weighted

    def queries(self, window: int, rows: Tensor) -> Tensor:
        """Rotated queries [g, T, D], scaled."""
        scoring = self.reader.scoring
        return rotate(self.reader.basis.inputs[window] @ rows.mT, scoring.turn) * scoring.scale

    def fit_queries(self, key: Tensor, seed: int) -> None:
        """Refit ``rows`` for rotated keys [N, T, D]."""
        scoring, inputs = self.reader.scoring, self.reader.basis.inputs

        def gradient(window: int, weighted: Tensor) -> Tensor:
            turned = rotate(weighted @ key[window] * scoring.scale, scoring.turn.conj())
            return turned.mT @ inputs[window]

        def normal(rows: Tensor) -> Tensor:
            return total(
                gradient(n, self.measure(n, self.queries(n, rows) @ key[n].mT))
                for n in range(len(inputs))
            )

        pull = total(gradient(n, pulled) for n, pulled in enumerate(self.pull))
        self.reader.rows = solve(
            normal, pull, self.reader.rows, ridge=RIDGE, steps=STEPS, seed=seed
        )

    def fit_still_keys(self, turning: Tensor, inputs: Tensor, rows: Tensor, seed: int) -> Tensor:
        """Refit the map [Dn, R] that gives the dims of a key without rotation; queries stand.

        Args:
            turning: [N, T, Dr] the rotated dims, which come first and stand.
            inputs: [N, T, R] what the others are made of.
            rows: [Dn, R] the map so far.
            seed: Of the probe that measures the scale of the ridge.
        """
        width = turning.shape[-1]
        query = [self.queries(n, self.reader.rows) for n in range(len(inputs))]

        def gradient(window: int, weighted: Tensor) -> Tensor:
            back = (weighted.mT @ query[window][..., width:]).sum(0)
            return back.mT @ inputs[window]

        def normal(rows: Tensor) -> Tensor:
            def of(window: int) -> Tensor:
                key = inputs[window] @ rows[0].mT
                scores = query[window][..., width:] @ key.mT
                return gradient(window, self.measure(window, scores))

            return total(of(n) for n in range(len(inputs)))[None]

        def missing(window: int) -> Tensor:
            standing = query[window][..., :width] @ turning[window].mT
            return self.pull[window] - self.measure(window, standing)

        pull = total(gradient(n, missing(n)) for n in range(len(inputs)))
        return solve(normal, pull[None], rows[None], ridge=RIDGE, steps=STEPS, seed=seed)[0]


def _fit_keys(
    rulers: Sequence[Ruler], inputs: Tensor, rows: Tensor, turn: Tensor, seed: int
) -> Tensor:
    """Refit the key projection [D, E'] for the queries as they stand."""
    query = [[ruler.queries(n, ruler.reader.rows) for n in range(len(inputs))] for ruler in rulers]

    def gradient(window: int, weighted: Sequence[Tensor]) -> Tensor:
        turned = total((w.mT @ q[window]).sum(0) for w, q in zip(weighted, query, strict=True))
        return rotate(turned, turn.conj()).mT @ inputs[window]

    def normal(rows: Tensor) -> Tensor:
        def of(window: int) -> Tensor:
            key = rotate(inputs[window] @ rows[0].mT, turn)
            return gradient(
                window,
                [r.measure(window, q[window] @ key.mT) for r, q in zip(rulers, query, strict=True)],
            )

        return total(of(n) for n in range(len(inputs)))[None]

    pull = total(gradient(n, [r.pull[n] for r in rulers]) for n in range(len(inputs)))
    return solve(normal, pull[None], rows[None], ridge=RIDGE, steps=STEPS, seed=seed)[0]
