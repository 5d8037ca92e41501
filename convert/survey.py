"""A first look at all layers, before the conversion to latents begins.

What stays rotary, and how a budget is split, is decided for all layers at once, so the keys and the
attention of every layer are looked at first: on the calibration text, or from the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.decoder import Decoder
from convert.execute import read_attention
from convert.facts import ModelFacts
from convert.latents import Sizes
from convert.layer import AttentionLayer, QkNorm
from convert.methods.attended import Attended, attended, presumed
from convert.methods.cut import kept_components, lost_without_turn
from convert.methods.fitting import second_moments
from convert.methods.latent import factored, still_keys, value_gram
from convert.methods.mixing import Mixed, Rows, mixed, query_energy, rows_of
from convert.methods.normed import factored_whole, mean_factors
from convert.streams import observe, threads_for
from convert.targets.dense_blocks import stock_config
from convert.targets.rope_tables import rope_table

__all__ = ["look", "survey", "white"]

_READS = frozenset({"q", "k", "v", "o", "q_norm", "k_norm"})
_LONGEST = 4096  # tokens of distance that are presumed at most


def look(layer: AttentionLayer, moment: Tensor, norm: QkNorm | None) -> tuple[Rows, Mixed]:
    """A layer's projections, and its keys as components.

    Args:
        layer: With q, k, v, o, its norms and ``rope``.
        moment: [E', E'] second moment of [x; 1].
        norm: Of its queries and keys.
    """
    rows = rows_of(layer, norm)
    energy = query_energy(rows, moment)
    if norm is not None:
        energy = energy * mean_factors(layer, norm, moment)[:, None]
    members = energy.reshape(layer.geometry.kv_heads, layer.geometry.group, -1).sum(1)
    return rows, mixed(rows, moment, members)


def white(hidden: int) -> Tensor:
    """[E', E'] the second moment that is assumed where no text is at hand."""
    return torch.eye(hidden + 1, dtype=torch.float64)


@torch.no_grad()
def survey(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    *,
    tokens: Tensor | None,
    device: str,
    splits: Sequence[Sizes],
    progress: Callable[[int], None],
) -> tuple[list[Attended], list[float]]:
    """What attention makes of the keys of each layer, and what each split of a budget would lose.

    Args:
        checkpoint: The open source; one decoder layer at a time is read.
        facts: Its attention.
        tokens: [N, T] calibration windows; None to presume it from the weights.
        device: Where the layers run.
        splits: Sizes to compare.
        progress: Called with the number of layers just done.

    Returns:
        One entry for each layer, and one for each split: the energy that it loses in the first
        approximation, as a share of a layer's, mean over the layers.

    Raises:
        InputModelError: If the model cannot be run, or holds or gives numbers that are not finite.
    """
    looks = (
        _presumed(checkpoint, facts)
        if tokens is None
        else _measured(checkpoint, facts, tokens, device)
    )
    found: list[Attended] = []
    lost = torch.zeros(len(splits), dtype=torch.float64)
    for number, (layer, moment, seen) in enumerate(looks):
        if len(splits) > 1:
            scale = facts.scales[number]
            shares = [
                _predicted(layer, moment, seen, sizes, scale=scale, norm=facts.qk_norm)
                for sizes in splits
            ]
            lost += torch.tensor(shares, dtype=torch.float64)
        found.append(seen)
        progress(1)
    return found, (lost / facts.layers).tolist()


def _measured(
    checkpoint: Checkpoint, facts: ModelFacts, tokens: Tensor, device: str
) -> Iterator[tuple[AttentionLayer, Tensor, Attended]]:
    """Each layer, the second moment of its input, and what its attention makes of it."""
    with threads_for(facts.geometry.hidden):
        decoder = Decoder(checkpoint, facts, context=tokens.shape[1], device=device)
        stream = decoder.embed(tokens)
        for number in range(facts.layers):
            layer = read_attention(checkpoint, facts, number, _READS, torch.float32)
            observed, stream = observe(facts, number, layer, decoder, stream)
            moment = second_moments([observed.inputs]).own[0]
            yield layer, moment, attended(observed, look(layer, moment, facts.qk_norm)[1])


def _presumed(
    checkpoint: Checkpoint, facts: ModelFacts
) -> Iterator[tuple[AttentionLayer, Tensor, Attended]]:
    norm = facts.qk_norm
    stock = stock_config(facts) if any(rope.dim for rope in facts.ropes) else None
    for number, rope in enumerate(facts.ropes):
        frequencies = rope_table(facts, stock, number).short if rope.dim else torch.zeros(0)
        layer = read_attention(checkpoint, facts, number, _READS, torch.float32)
        moment = white(facts.geometry.hidden)
        rows, components = look(layer, moment, norm)
        seen = presumed(
            layer,
            rows,
            components,
            query_energy(rows, moment),
            frequencies,
            context=min(facts.context, _LONGEST),
            factors=None if norm is None else mean_factors(layer, norm, moment),
        )
        yield layer, moment, seen


def _predicted(
    layer: AttentionLayer,
    moment: Tensor,
    seen: Attended,
    sizes: Sizes,
    *,
    scale: float,
    norm: QkNorm | None,
) -> float:
    """Share of its energy that a layer of given sizes loses, before refits."""
    rows, components = look(layer, moment, norm)
    cut = lost_without_turn(seen)
    (kept,) = kept_components([cut], sizes.rope_dims // 2, "greedy", common=False)
    found = (factored if norm is None else factored_whole)(
        still_keys(rows, components, seen.turn, kept, 1.0),
        rows.v,
        key_metric=seen.queries * scale**2,
        value_gram=value_gram(layer, seen.values),
        moment=moment,
        rank=sizes.rank,
    )
    # a score is the real part of a complex product, half of its energy; it counts twice, since
    # refits repair less of a lost rotation than of a lost direction (measured: better splits)
    turning = float(cut[~kept].sum()) * scale**2
    whole = float(seen.energy.sum()) * scale**2 + found.energy
    return (turning + found.lost) / whole
