"""Refitting query and key projections: the converted scores as near to the original as they get.

Near the original, the divergence of the attention row of one query is half of
``d^T (diag p - p p^T) d``, where p are the original weights and d the error of the scores. The
scores are linear in the query projection while keys stand, and in the key projection while queries
stand, so either is a least squares problem in that metric. They are solved in turn: a map of each
head's queries as they are, then keys, then the whole query projection. The normal equations are
never formed: a product with their matrix costs two matrix products like those of attention itself,
and conjugate gradients needs a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.methods.attention import Scoring, rotate, weights
from convert.methods.halves import gram
from convert.methods.least_squares import RIDGE, Tick, no_tick, solve, total
from convert.methods.spectral import lower_root

__all__ = [
    "STEPS",
    "Basis",
    "Reader",
    "Ruler",
    "basis_of",
    "refit_queries",
    "refit_scores",
]

# of conjugate gradients: measured, more gain on the text itself, but more windows in the same time
# gain more on others
STEPS = 5
# of the norm of the inputs' second moment: directions of a variance far below it are left alone
_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class Basis:
    """Inputs of a projection, and coordinates in which they are white.

    Least squares then converges in few steps, whatever the scale of single input dims.

    Args:
        inputs: [N, T, E'] with the constant 1 of a bias as last of them if there is one.
        white: [N, T, R] the same in those coordinates.
        back: [R, E'] what takes rows that read white inputs to rows that read ``inputs``.
    """

    inputs: Tensor
    white: Tensor
    back: Tensor


@dataclass(slots=True)
class Reader:
    """Query heads of one layer that read one KV head, and what their scores should be.

    Args:
        basis: The inputs of their projection.
        rows: [g, D, E'] the projection with its bias; it is replaced as it is refitted.
        target: [N, g, T, T] scores of the original layer, before cap, offset and mask.
        scoring: How scores become weights.
        share: How much its errors count beside those of other readers.
        asked: [g, N * T, D] queries before rotation, which ``rows`` give; None to compute them.
        tick: Called after each step of a fit.
    """

    basis: Basis
    rows: Tensor
    target: Tensor
    scoring: Scoring
    share: float = 1.0
    asked: Tensor | None = None
    tick: Tick = no_tick

    def projected(self) -> Tensor:
        """[g, N * T, D] queries before rotation."""
        if self.asked is None:
            self.asked = self.basis.inputs.flatten(0, 1) @ self.rows.mT
        return self.asked


def basis_of(inputs: Tensor, *, bias: bool) -> Basis:
    """White coordinates of inputs [N, T, E], all but for a floor; with ``bias``, of [x; 1].

    Fewer tokens than dims have as many coordinates as there are tokens.
    """
    if bias:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
    rows = inputs.flatten(0, -2)
    tokens, dims = rows.shape
    moment = gram(rows if tokens >= dims else rows.mT).double() / tokens
    # what is always zero stays zero
    floor = max(_FLOOR * float(moment.norm()), torch.finfo(torch.float32).tiny)
    root = lower_root(moment, floor)
    if tokens >= dims:
        unit = torch.eye(dims, dtype=root.dtype, device=root.device)
        back = torch.linalg.solve_triangular(root, unit, upper=False).to(inputs.dtype)
    else:
        back = torch.cholesky_inverse(root).to(inputs.dtype) @ rows / math.sqrt(tokens)
    return Basis(inputs, inputs @ back.mT, back)


def refit_queries(readers: Sequence[Reader], key: Tensor, *, seed: int) -> None:
    """Refit the query projections of all readers of one KV head, whose keys stand.

    Args:
        readers: Everything that is to be refitted; their ``rows`` are replaced.
        key: [N, T, D] rotated keys.
        seed: Of the random errors that tell the scale of the problem.
    """
    for number, reader in enumerate(readers):
        Ruler(reader, seed + number).fit_queries(key)


def refit_scores(readers: Sequence[Reader], basis: Basis, key_rows: Tensor, *, seed: int) -> Tensor:
    """Refit the query projections of all readers of one KV head, and its key projection.

    Args:
        readers: Everything that reads this KV head; their ``rows`` are replaced.
        basis: The inputs of the key projection.
        key_rows: [D, E'] that projection.
        seed: Of the random errors that tell the scale of the problems.

    Returns:
        The new key projection.
    """
    rulers = [Ruler(reader, seed + number) for number, reader in enumerate(readers)]
    turn = readers[0].scoring.turn
    key = rotate(basis.inputs @ key_rows.mT, turn)
    for ruler in rulers:
        ruler.map_queries(key)
    key_rows = _fit_keys(rulers, basis, key_rows, turn)
    key = rotate(basis.inputs @ key_rows.mT, turn)
    for ruler in rulers:
        ruler.fit_queries(key)
    return key_rows


class Ruler:
    """The metric in which the scores of one reader are fitted, window by window.

    Args:
        reader: What is measured.
        seed: Of the signs of random errors.
    """

    def __init__(self, reader: Reader, seed: int) -> None:
        self.reader = reader
        scoring = reader.scoring
        self.weights = weights(reader.target, scoring)
        self.slope: Tensor | None = None
        if scoring.softcap is not None:  # how much of a change of the score the cap lets through
            self.slope = 1 - torch.tanh(reader.target / scoring.softcap).square()
        draws = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, self.weights.shape[1:], generator=draws, dtype=torch.int8)
        self._signs = (2 * signs - 1).to(self.weights)

    def measure(self, window: int, error: Tensor) -> Tensor:
        """``(diag p - p p^T) error`` of scores [g, T, T]."""
        if self.slope is not None:
            error = self.slope[window] * error
        weighted = self.weights[window] * error
        mean = weighted.sum(-1, keepdim=True)
        weighted = torch.addcmul(weighted, self.weights[window], mean, value=-1) * self.reader.share
        return weighted if self.slope is None else self.slope[window] * weighted

    def noise(self, window: int) -> Tensor:
        """Random errors of scores [g, T, T] whose second moment is that metric."""
        error = self.weights[window].sqrt() * self._signs
        error = torch.addcmul(error, self.weights[window], error.sum(-1, keepdim=True), value=-1)
        error = error * math.sqrt(self.reader.share)
        return error if self.slope is None else self.slope[window] * error

    def queries(self, window: int) -> Tensor:
        """Rotated queries [g, T, D], scaled."""
        turn = self.reader.scoring.turn
        asked = self.reader.projected()[:, window * len(turn) : (window + 1) * len(turn)]
        return rotate(asked, turn) * self.reader.scoring.scale

    def fit_queries(self, key: Tensor) -> None:
        """Refit ``rows`` for rotated keys [N, T, D]."""
        basis = self.reader.basis
        self.reader.rows = self.reader.rows + self._change(_flat(basis), key) @ basis.back
        self.reader.asked = None

    def map_queries(self, key: Tensor) -> None:
        """Refit a map [D, D] of what ``rows`` give, for rotated keys [N, T, D].

        That is most of what keys want of queries before they are refitted themselves, and takes
        less work than new ``rows``, D / E' of it.
        """
        rows, asked = self.reader.rows, self.reader.projected()
        bases = [basis_of(head, bias=False) for head in asked]
        change = self._change(torch.stack([basis.white for basis in bases]), key)
        change = change @ torch.stack([basis.back for basis in bases])
        self.reader.rows, self.reader.asked = rows + change @ rows, asked + asked @ change.mT

    def _change(self, inputs: Tensor, key: Tensor) -> Tensor:
        """What to add to the projections of inputs [1 or g, n, E'], to queries as they are."""
        asked = self.reader.projected()
        scale, turn = self.reader.scoring.scale, self.reader.scoring.turn
        windows = range(len(key))

        def scores(asked: Tensor, window: int) -> Tensor:
            query = asked[:, window * len(turn) : (window + 1) * len(turn)]
            return (rotate(query, turn) * scale) @ key[window].mT

        def pull(errors: Callable[[int], Tensor]) -> Tensor:
            return torch.cat([rotate(errors(n) @ key[n] * scale, turn.conj()) for n in windows], 1)

        def metric(asked: Tensor) -> Tensor:
            return pull(lambda n: self.measure(n, scores(asked, n)))

        missing = pull(lambda n: self.measure(n, self.reader.target[n] - scores(asked, n)))
        moment = gram(pull(self.noise))
        tick = self.reader.tick
        return solve(inputs, metric, missing, moment, ridge=RIDGE, steps=STEPS, tick=tick)

    def fit_still_keys(self, turning: Tensor, inputs: Tensor, rows: Tensor) -> Tensor:
        """Refit the map [Dn, R] that gives the dims of a key without rotation; queries stand.

        Args:
            turning: [N, T, Dr] the rotated dims, which come first and stand.
            inputs: [N, T, R] what the others are made of.
            rows: [Dn, R] the map so far.
        """
        windows, width = range(len(inputs)), turning.shape[-1]
        query = [self.queries(n) for n in windows]

        def pull(errors: Callable[[int], Tensor]) -> Tensor:
            return torch.cat([_back(errors(n), query[n][..., width:]) for n in windows])[None]

        def metric(key: Tensor) -> Tensor:
            key = key.view(*inputs.shape[:2], -1)
            return pull(lambda n: self.measure(n, query[n][..., width:] @ key[n].mT))

        def wanting(window: int) -> Tensor:
            key = torch.cat([turning[window], inputs[window] @ rows.mT], -1)
            return self.measure(window, self.reader.target[window] - query[window] @ key.mT)

        moment, given = gram(pull(self.noise)), inputs.flatten(0, 1)[None]
        change = solve(given, metric, pull(wanting), moment, ridge=RIDGE, steps=STEPS)
        return rows + change[0]


def _fit_keys(rulers: Sequence[Ruler], basis: Basis, rows: Tensor, turn: Tensor) -> Tensor:
    """Refit the key projection [D, E'] for the queries as they stand."""
    windows = range(len(basis.inputs))
    query = [[ruler.queries(n) for n in windows] for ruler in rulers]

    def pull(errors: Callable[[Ruler, int, Tensor], Tensor]) -> Tensor:
        def of(window: int) -> Tensor:
            pairs = zip(rulers, query, strict=True)
            asked = total(_back(errors(r, window, q[window]), q[window]) for r, q in pairs)
            return rotate(asked, turn.conj())

        return torch.cat([of(n) for n in windows])[None]

    def metric(key: Tensor) -> Tensor:
        key = rotate(key.view(*basis.inputs.shape[:2], -1), turn)
        return pull(lambda ruler, n, q: ruler.measure(n, q @ key[n].mT))

    key = rotate(basis.inputs @ rows.mT, turn)
    missing = pull(lambda ruler, n, q: ruler.measure(n, ruler.reader.target[n] - q @ key[n].mT))
    moment = gram(pull(lambda ruler, n, _: ruler.noise(n)))
    flat, tick = _flat(basis), rulers[0].reader.tick
    change = solve(flat, metric, missing, moment, ridge=RIDGE, steps=STEPS, tick=tick)
    return rows + change[0] @ basis.back


def _back(errors: Tensor, queries: Tensor) -> Tensor:
    """What errors [g, T, T] of the scores of queries [g, T, D] pull at keys [T, D]."""
    return errors.flatten(0, 1).mT @ queries.flatten(0, 1)


def _flat(basis: Basis) -> Tensor:
    """White inputs [1, n, R]."""
    return basis.white.flatten(0, 1)[None]
