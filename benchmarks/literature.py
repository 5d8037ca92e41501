"""MLA as published: real mixing, one rotary component for each frequency, a balanced joint PCA.

That is TransMLA (arXiv:2502.07864): keys of a RoPE plane are mixed by the real PCA of their
activations, the first component of evenly spaced frequencies stays rotary, all others lose their
rotation without replacement, keys and values are balanced by their mean norm and compressed by one
uncentred PCA. Here for comparison alone; nothing in the package uses it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convert.decoder import Decoder
from convert.execute import read_attention
from convert.hub import Source
from convert.layer import AttentionLayer, LatentLayer
from convert.methods.attention import Scoring, keys, queries, values
from convert.methods.fitting import head_outputs, projected, second_moments
from convert.methods.latent import factored, latent_form
from convert.methods.mixing import Mixed, Rows, rows_of
from convert.methods.refit_latent import expanded
from convert.opening import open_model
from convert.streams import ready, scoring_of

__all__ = ["Published", "published_loss"]

_PARTS = frozenset({"q", "k", "v", "o"})


@dataclass(frozen=True, slots=True)
class Published:
    """What the published method loses.

    Args:
        source_perplexity: Of the source.
        perplexity: Of its conversion.
        kl: Nats per token of the conversion from the source.
    """

    source_perplexity: float
    perplexity: float
    kl: float


@torch.no_grad()
def published_loss(
    source: Path, calibration: Tensor, text: Tensor, *, rank: int, pairs: int
) -> Published:
    """What the conversion of a source loses on windows [N, T] of a text.

    Args:
        source: A Llama checkpoint.
        calibration: [N, T] tokens for the PCAs.
        text: [N, T] tokens to measure on.
        rank: Width of the latent.
        pairs: Pairs of the rotary key.
    """
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with open_model(Source(source, "")) as model:
        checkpoint, facts = model.checkpoint, model.facts
        decoder = Decoder(checkpoint, facts, context=text.shape[1], device="cpu")
        original = decoder.embed(torch.cat([calibration, text]))
        converted, count = original[len(calibration) :].clone(), len(calibration)
        for number in range(facts.layers):
            layer = read_attention(checkpoint, facts, number, _PARTS, torch.float32)
            with decoder.block(number) as block:
                original, inputs, _ = block.run_all(original)
                moment = second_moments([inputs[:count]]).own[0]
                latent = _published(layer, moment, facts.scales[number], rank, pairs)
                scoring = scoring_of(facts, number, decoder, text.shape[1])
                outputs = _outputs(latent, scoring, block.attention_inputs(converted))
                converted = block.run_all_with(converted, outputs)
    truth, found = (_log_probabilities(stock, h) for h in (original[count:], converted))
    kl = torch.nn.functional.kl_div(found, truth, log_target=True, reduction="none").sum(-1).mean()
    return Published(_perplexity(truth, text), _perplexity(found, text), float(kl))


def _published(
    layer: AttentionLayer, moment: Tensor, scale: float, rank: int, pairs: int
) -> LatentLayer:
    rows = rows_of(layer)
    mixed = _really_mixed(rows, moment)
    planes, heads = mixed.energy.shape
    kept = torch.zeros(planes, heads, dtype=torch.bool)
    kept[:: planes // pairs, 0] = True
    still = mixed.rows[~kept]
    parts = torch.cat([still.real, still.imag])
    ratio = _mean_norm(parts, moment) / _mean_norm(rows.v.flatten(0, 1), moment)
    found = factored(
        parts[None] / ratio,
        rows.v,
        key_metric=torch.eye(len(parts), dtype=torch.float64)[None],
        value_gram=torch.eye(rows.v[..., 0].numel(), dtype=torch.float64),
        moment=moment,
        rank=rank,
        centred=False,
    )
    real, imaginary = (ratio * found.k_up[0]).chunk(2)
    component = torch.zeros(planes, heads, rank, dtype=torch.complex128)
    component[~kept] = torch.complex(real, imaginary)
    read = torch.einsum("gpj,pjr->gpr", mixed.maps, component)
    k_up = torch.stack([read.real, read.imag], 2).flatten(1, 2)
    factors = dataclasses.replace(found, k_up=k_up)
    return latent_form(layer, rows, mixed, kept=kept, factored=factors, scale=scale)


def _really_mixed(rows: Rows, moment: Tensor) -> Mixed:
    """Components by the real PCA of each plane, both parts of a key being samples."""
    turning = rows.turning_k
    covariance = torch.einsum("gpe,ef,hpf->pgh", turning, moment.to(turning.dtype), turning.conj())
    energy, vectors = torch.linalg.eigh(covariance.real)
    vectors = vectors.flip(-1).to(turning.dtype)
    mixed = torch.einsum("pgj,gpe->pje", vectors, turning)
    return Mixed(mixed, vectors.transpose(0, 1), energy.flip(-1))


def _mean_norm(rows: Tensor, moment: Tensor) -> float:
    return float(((rows @ moment) * rows).sum(-1).clamp(min=0).sqrt().mean())


def _outputs(latent: LatentLayer, scoring: Scoring, inputs: Tensor) -> Tensor:
    part = Scoring(
        visible=scoring.visible,
        turn=scoring.turn[:, list(latent.planes)],
        scale=scoring.scale,
    )
    layer = ready(expanded(latent), "cpu")
    shared = keys(layer, part, inputs), values(layer, part, inputs)
    return projected(layer, head_outputs(queries(layer, part, inputs), part, shared))


def _log_probabilities(stock: torch.nn.Module, hidden: Tensor) -> Tensor:
    """[N, T - 1, V] of the tokens after the first of each window."""
    logits: Tensor = stock.get_submodule("lm_head")(stock.get_submodule("model.norm")(hidden))
    return logits[:, :-1].log_softmax(-1)


def _perplexity(found: Tensor, text: Tensor) -> float:
    loss = torch.nn.functional.nll_loss(found.flatten(0, 1), text[:, 1:].flatten())
    return math.exp(float(loss))
