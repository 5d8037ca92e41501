"""A first look at all layers, before the conversion to latents begins.

What stays rotary, and how a budget is split, is decided for all layers at once, so the keys and the
attention of every layer are looked at first: on the calibration text, or from the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.decoder import Decoder
from convert.execute import read_attention
from convert.facts import ModelFacts
from convert.methods.attended import Attended, attended, presumed
from convert.methods.budget import Prospect
from convert.methods.cut import Selection, kept_components, lost_without_turn
from convert.methods.fitting import second_moments
from convert.methods.joint import Joint, factored_jointly, joint, shares_of, together
from convert.methods.latent import still_keys
from convert.methods.mixing import Mixture, query_energy
from convert.progress import LayerProgress
from convert.steps import units_of
from convert.streams import observe, solvable, threads_for
from convert.targets.dense_blocks import stock_config
from convert.targets.rope_tables import rope_table

__all__ = ["Survey", "survey"]

_READS = frozenset({"q", "k", "v", "o", "q_norm", "k_norm"})
# a score is the real part of a complex product, half of its energy; but a lost rotation costs more
# than a lost direction of the same energy: refits repair less of it (measured: at a sixteenth of
# the cache half of the loss, against a factor of 1), and white inputs, which are presumed without
# data, have most of their energy where real ones have none (measured on two models at budgets of a
# sixteenth to a quarter: a fifth to four fifths of the loss)
_TURNING, _TURNING_UNSEEN = 2, 64
_LONGEST = 4096  # tokens of distance that are presumed at most
# one window of so many is looked at: measured, with all of them nothing is chosen better (at an
# eighth and a sixteenth of the cache losses differ by a hundredth, either way)
_EVERY = 4
_OBSERVED = 0.5  # of the look at a layer, about; the rest are decompositions

_Looks = Generator[tuple[Joint, Attended, float | None]]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found of one unit of layers.

    Args:
        mixture: How its keys become components.
        attended: What attention makes of them.
        prospect: What it would lose at the sizes that were asked for.
    """

    mixture: Mixture
    attended: Attended
    prospect: Prospect


@torch.no_grad()
def survey(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    *,
    sources: Sequence[int],
    tokens: Tensor | None,
    device: str,
    pairs: Sequence[int],
    rank: int,
    selection: Selection,
    progress: Callable[[int], None],
) -> list[Survey]:
    """Look at all units of layers that share a latent, in layer order.

    Args:
        checkpoint: The open source; one decoder layer at a time is read.
        facts: Its attention.
        sources: For each layer the one whose latent it will read.
        tokens: [N, T] calibration windows, of which every fourth is looked at; None to presume
            attention from the weights.
        device: Where the layers run.
        pairs: Numbers of rotary pairs to predict losses for.
        rank: Latent dims up to which they are predicted.
        selection: How pairs are chosen.
        progress: Called with the number of parts just done, as by ``LayerProgress``.

    Raises:
        InputModelError: If the model cannot be run, or holds or gives numbers that are not finite.
    """
    units, work = units_of(sources), LayerProgress(progress)
    looks = (
        _presumed(checkpoint, facts, units)
        if tokens is None
        else _measured(checkpoint, facts, units, tokens, device=device, work=work)
    )
    found = []
    with closing(looks):
        for unit in units:
            with work.layers(len(unit)), solvable(unit):
                layers, seen, power = next(looks)
                prospect = _prospect(
                    layers, seen, pairs, rank=rank, selection=selection, power=power
                )
            found.append(Survey(layers.mixture, seen, prospect))
    return found


def _measured(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    units: Sequence[tuple[int, ...]],
    tokens: Tensor,
    *,
    device: str,
    work: LayerProgress,
) -> _Looks:
    """Each unit, what its attention makes of its keys, and the power of the residual stream."""
    tokens = tokens[::_EVERY]
    with threads_for(facts.geometry.hidden):
        decoder = Decoder(checkpoint, facts, context=tokens.shape[1], device=device)
        stream = decoder.embed(tokens)
        for unit in units:
            layers, seen = [], []
            for number in unit:
                layers.append(read_attention(checkpoint, facts, number, _READS, torch.float32))
                tick = work.ticks(_OBSERVED, len(tokens))
                observed, stream = observe(facts, number, layers[-1], decoder, stream, tick=tick)
                seen.append(observed)
            inputs = second_moments([one.inputs for one in seen])
            found = joint(layers, inputs, shares_of(seen), facts.qk_norm)
            powers = [float((s.before + s.outputs).square().sum(-1).mean()) for s in seen]
            parts = [
                attended(one, found.mixed_for(place), read=seen[0].inputs)
                for place, one in enumerate(seen)
            ]
            scales = [facts.scales[number] for number in unit]
            weights = [powers[0] / power for power in powers]
            yield found, together(parts, scales, weights), powers[0]


def _presumed(
    checkpoint: Checkpoint, facts: ModelFacts, units: Sequence[tuple[int, ...]]
) -> _Looks:
    stock = stock_config(facts) if any(rope.dim for rope in facts.ropes) else None
    for unit in units:
        turns = facts.ropes[unit[0]].dim > 0
        frequencies = rope_table(facts, stock, unit[0]).short if turns else torch.zeros(0)
        layers = [read_attention(checkpoint, facts, n, _READS, torch.float32) for n in unit]
        found = joint(layers, None, [1.0] * len(unit), facts.qk_norm)
        parts = [
            presumed(
                layer,
                found.rows_of(place),
                found.mixed_for(place),
                query_energy(found.rows_of(place), found.moment),
                frequencies,
                context=min(facts.context, _LONGEST),
                factors=found.factors,
            )
            for place, layer in enumerate(layers)
        ]
        scales = [facts.scales[number] for number in unit]
        yield found, together(parts, scales, [1.0] * len(unit)), None


def _prospect(
    unit: Joint,
    seen: Attended,
    pairs: Sequence[int],
    *,
    rank: int,
    selection: Selection,
    power: float | None,
) -> Prospect:
    """What a unit would lose, before refits.

    Args:
        unit: The layers.
        seen: What attention makes of their keys.
        pairs: Numbers of rotary pairs to predict losses for.
        rank: Latent dims up to which they are predicted.
        selection: How pairs are chosen.
        power: Of the residual stream, the unit of its energies; None if it is not known, and each
            unit of layers counts alike.
    """
    cut = lost_without_turn(seen)
    turning, spectra, beyond = {}, {}, {}
    whole = 0.0
    for count in dict.fromkeys(min(count, cut.numel()) for count in pairs):
        (kept,) = kept_components([cut], count, selection, common=False)
        still = still_keys(unit.rows, unit.mixed, seen.turn, kept, 1.0)
        found = factored_jointly(unit, seen, still, rank, centred=True)
        spectra[count], beyond[count] = found.kept, found.lost
        whole = max(whole, found.energy)
        turning[count] = (_TURNING_UNSEEN if power is None else _TURNING) * float(cut[~kept].sum())
    whole += float(seen.energy.sum())
    return Prospect(turning, spectra, beyond, 1 / (power or whole or 1.0))
