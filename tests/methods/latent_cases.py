"""Small latent layers beside the layers that they come from, for tests of their refits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from convert.layer import AttentionLayer, LatentLayer, QkNorm
from convert.methods.attended import attended
from convert.methods.attention import Scoring
from convert.methods.cut import kept_components, lost_without_turn
from convert.methods.fitting import Observed, second_moments
from convert.methods.latent import factored, latent_form, still_keys, value_gram
from convert.methods.mixing import mixture, query_energy, rows_of
from convert.methods.normed import factored_whole, normed_form
from convert.methods.refit_latent import Reading, refit_latent_scores
from tests.methods.layers import Shape, one_by_one, randn, random_layer
from tests.methods.references import (
    EPS,
    NORMS,
    causal_weights,
    frequencies,
    latent_outcome,
    latent_scores,
    observed_of,
    original_scores,
    with_norms,
)

__all__ = [
    "SHAPES",
    "Case",
    "E",
    "N",
    "T",
    "all_shapes",
    "divergence",
    "latent_case",
    "normed_shapes",
    "shapes",
]

N, T, E, PAIRS, RANK = 3, 9, 7, 2, 3
SHAPES = {
    "MHA": Shape(kv_heads=2, group=1, head_dim=4, hidden=E),
    "GQA biases": Shape(kv_heads=2, group=2, hidden=E, biases=("q", "k", "v", "o")),
    "interleaved": Shape(kv_heads=3, group=1, hidden=E, biases=("q",), interleaved=True),
    "NoPE": Shape(kv_heads=2, group=1, head_dim=4, hidden=E, rope_dim=0, biases=("k",)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
NORMED = {
    "MHA full": ("MHA", "full"),
    "GQA biases shared": ("GQA biases", "shared"),
    "interleaved layer": ("interleaved", "layer"),
    "NoPE plus one": ("NoPE", "plus one"),
}
normed_shapes = pytest.mark.parametrize(
    ("shape", "norm"),
    [(SHAPES[shape], NORMS[norm]) for shape, norm in NORMED.values()],
    ids=NORMED,
)
all_shapes = pytest.mark.parametrize(
    ("shape", "norm"),
    [
        *((shape, None) for shape in SHAPES.values()),
        *((SHAPES[shape], NORMS[norm]) for shape, norm in NORMED.values()),
    ],
    ids=[*SHAPES, *NORMED],
)


@dataclass(frozen=True, slots=True)
class Case:
    """An original layer, what it did, and its latent form; inputs of both differ a little."""

    original: AttentionLayer
    observed: Observed
    layer: LatentLayer
    scoring: Scoring
    inputs: Tensor
    speeds: Tensor
    norm: QkNorm | None

    def targets(self) -> Tensor:
        """[N, H, T, T] scores of the original."""
        return torch.stack(
            [
                original_scores(self.original, x, self.speeds, self.layer.scale, self.norm)
                for x in self.observed.inputs
            ]
        )

    def scores(self, layer: LatentLayer) -> Tensor:
        """[N, H, T, T]."""
        return torch.stack([latent_scores(layer, x, self.speeds, self.norm) for x in self.inputs])

    def outcomes(self, layer: LatentLayer) -> Tensor:
        """[N, T, E]."""
        return torch.stack([latent_outcome(layer, x, self.speeds) for x in self.inputs])

    def refitted(self) -> LatentLayer:
        reading = Reading(
            layer=self.layer, observed=self.observed, scoring=self.scoring, inputs=self.inputs
        )
        (found,) = refit_latent_scores([reading], self.inputs, each=one_by_one, seed=5)
        return found


def latent_case(
    shape: Shape, norm: QkNorm | None = None, *, rank: int = RANK, pairs: int = PAIRS
) -> Case:
    original = with_norms(random_layer(shape, seed=2), norm, seed=6)
    assert original.q is not None
    original = dataclasses.replace(original, q=0.3 * original.q)
    before = randn(N, T, E, seed=3) + 0.3
    observed = observed_of(original, before, norm=norm, norm_eps=EPS)
    moment, rows = second_moments([before]).own[0], rows_of(original, norm)
    weights = query_energy(rows, moment).reshape(shape.kv_heads, shape.group, rows.planes).sum(1)
    components = mixture(rows, moment, weights).of(rows)
    seen = attended(observed, components)
    (kept,) = kept_components([lost_without_turn(seen)], pairs, "greedy", common=False)
    factor, form = (factored, latent_form) if norm is None else (factored_whole, normed_form)
    found = factor(
        still_keys(rows, components, seen.turn, kept, 1.0),
        rows.v,
        key_metric=seen.queries,
        value_gram=value_gram(original, seen.values),
        moment=moment,
        rank=rank,
    )
    scale = observed.scoring.scale
    layer = form(original, rows, components, kept=kept, factored=found, scale=scale)
    turn = observed.scoring.turn[:, list(layer.planes)]
    return Case(
        original=original,
        observed=observed,
        layer=layer,
        scoring=dataclasses.replace(observed.scoring, turn=turn),
        inputs=before + 0.1 * randn(N, T, E, seed=4),
        speeds=frequencies(rows.planes),
        norm=norm,
    )


def divergence(case: Case, layer: LatentLayer) -> Tensor:
    """Mean KL divergence of the attention rows from those of the original."""
    truth, found = causal_weights(case.targets()), causal_weights(case.scores(layer))
    return torch.where(truth > 0, truth * (truth / found).log(), 0.0).sum(-1).mean()
