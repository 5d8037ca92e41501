"""Retrieval from a long context: a key stated once at a given depth, asked for at the end.

Merged keys may lose single far tokens long before perplexity shows it. The probe is the pass key
task of Mohtashami and Jaggi (arXiv:2305.16300) in plain prose, so that base models can do it: the
sentence that states the key is repeated at the end up to the key, which the model must continue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.lengths import check_pair, config_of, position_limit
from convert.loading import Pair, quiet_transformers
from convert.paired import Mean, paired_mean
from convert.texts import Text
from convert.tokens import TextTokens, embedding_rows
from kvpatch.errors import InputModelError, UsageError, VerificationError

__all__ = ["KEYS", "Cell", "Retrieval", "built_in_text", "default_lengths", "measure_retrieval"]

_LONGEST_DEFAULT = 4096
# common words of one syllable or two, none of which names a thing of the built-in text
_WORDS = (  # noqa: SIM905 - a paragraph, not a page
    "anchor bottle candle copper cotton desert engine feather finger harbour hammer island jungle "
    "kettle ladder lemon marble mirror needle orange paper pepper pillow rabbit ribbon river "
    "saddle silver spider summer thunder ticket tunnel velvet window winter"
).split()


@dataclass(frozen=True, slots=True)
class _Key:
    """A kind of key: the words before it, and how one is drawn."""

    cue: str
    draw: Callable[[np.random.Generator], str]


KEYS: Mapping[str, _Key] = {
    "digits": _Key("\nThe pass key is", lambda rng: str(rng.integers(10_000, 100_000))),
    "words": _Key(
        "\nThe secret words are", lambda rng: " ".join(rng.choice(_WORDS, 3, replace=False))
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Trials of one length at one depth.

    Args:
        length: Tokens of a sequence, key at the end included.
        depth: Where the key was stated: 0 at the start, 100 right before the question.
        exact: Share of trials in which every token of the key ranks first after the true ones
            before it, which is when greedy decoding gives the key.
        log_likelihood: Of the key, in nats.
        gain: By how much stating the key raises its log likelihood over the same text without it,
            in nats; also tells apart models that never find a whole key.
    """

    length: int
    depth: float
    exact: Mean
    log_likelihood: Mean
    gain: Mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """A probe and everything that is needed to repeat it.

    Args:
        text: Name of the text around the key.
        text_sha256: Hash of its bytes.
        key: Kind of key.
        lengths: Tokens of a sequence.
        depths: Of the key, in percent.
        trials: Keys, each with a part of the text, asked for at every length and depth.
        seed: Draws keys and parts.
        dtype: Dtype in which the models ran.
        cells: By length, then depth.
        exact: Over all cells; errors are between trials, whose cells are not independent.
        gain: The same.
    """

    text: str
    text_sha256: str
    key: str
    lengths: list[int]
    depths: list[float]
    trials: int
    seed: int
    dtype: str
    cells: list[Cell]
    exact: Mean
    gain: Mean


@dataclass(frozen=True, slots=True)
class _Trial:
    """A key in tokens: the sentence that states it, the same up to its end, and its own length."""

    start: int
    needle: list[int]
    closing: list[int]
    answer: int


@dataclass(frozen=True, slots=True)
class _Scores:
    """[trials, 1 + depths] of one length, the first column without the key."""

    log_likelihood: Tensor
    exact: Tensor


def built_in_text() -> Text:
    """The text around the key where none is given."""
    content = resources.files("convert").joinpath("assets/demo-text.txt").read_bytes()
    return Text("built-in text", hashlib.sha256(content).hexdigest(), [content.decode()])


def default_lengths(limit: int) -> list[int]:
    """A quarter, half and all of the positions of a model, but not more than 4,096."""
    longest = min(limit, _LONGEST_DEFAULT)
    return [longest // 4, longest // 2, longest]


def measure_retrieval(
    pair: Pair,
    text: Text,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = (0, 25, 50, 75, 100),
    trials: int = 20,
    key: str = "digits",
    seed: int = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Retrieval:
    """Ask a model, and its source if there is one, for keys stated far back.

    Args:
        pair: Model and source.
        text: What stands around the key, repeated where it is too short.
        lengths: Tokens of a sequence; ``default_lengths`` of the model if not given.
        depths: In percent of the text before the question.
        trials: Number of keys.
        key: Kind of key, of ``KEYS``.
        seed: Draws keys and parts of the text.
        batch: Sequences in one forward pass.
        progress: Called with sequences done and in all.
        warn: Called with each warning.

    Raises:
        UsageError: If a length, depth or kind of key makes no sense for the model.
        InputModelError: If the text has no tokens, or some that a model has no row for.
        VerificationError: If a model gives logits that are not finite.
    """
    if lengths is None:
        lengths = default_lengths(position_limit(config_of(pair.model)))
    lengths = list(lengths)
    _check(lengths, depths, key)
    for warning in check_pair(pair, max(lengths), f"--lengths {max(lengths)}"):
        if warn is not None:
            warn(warning)
    with quiet_transformers():
        encode = TextTokens(pair.tokenizer, embedding_rows(pair.model, pair.source), text.name)
        haystack, opening = encode.joined(text.documents), encode.opening
    if not haystack:
        raise InputModelError(f"{text.name} has no tokens")
    keys = [_draw(KEYS[key], encode, len(haystack), seed, trial) for trial in range(trials)]
    _check_room(lengths, keys, opening)
    total, done = len(lengths) * trials * (1 + len(depths)), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    models = [pair.model] if pair.source is None else [pair.model, pair.source]
    found: list[list[_Scores]] = []  # by length, then model
    for length in lengths:
        sequences = torch.tensor(
            [
                _sequence(trial, haystack, opening, length, depth)
                for trial in keys
                for depth in (None, *depths)
            ]
        )
        answers = torch.tensor([t.answer for t in keys]).repeat_interleave(1 + len(depths))
        batches = _batches(sequences, answers, batch)
        found.append(_run(models, batches, trials, advance))
    if not all(scores.log_likelihood.isfinite().all() for row in found for scores in row):
        raise VerificationError(f"{pair.name} or its source gives logits that are NaN or infinite")
    return Retrieval(
        text=text.name,
        text_sha256=text.sha256,
        key=key,
        lengths=lengths,
        depths=list(depths),
        trials=trials,
        seed=seed,
        dtype=str(pair.model.dtype).removeprefix("torch."),
        cells=[
            _cell(length, depth, column, scores)
            for length, scores in zip(lengths, found, strict=True)
            for column, depth in enumerate(depths, 1)
        ],
        exact=_overall(found, _exact),
        gain=_overall(found, _gain),
    )


def _check(lengths: Sequence[int], depths: Sequence[float], key: str) -> None:
    if key not in KEYS:
        raise UsageError(f"--key {key}: choose one of {', '.join(KEYS)}")
    if not lengths:
        raise UsageError("--lengths is empty: give numbers of tokens")
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise UsageError(f"--depths {','.join(map(str, depths))}: give percents from 0 to 100")


def _check_room(lengths: Sequence[int], keys: Sequence[_Trial], opening: Sequence[int]) -> None:
    needed = len(opening) + max(len(trial.needle) + len(trial.closing) for trial in keys)
    if min(lengths) < needed:
        raise UsageError(
            f"--lengths {min(lengths)} is too short to state a key and ask for it",
            hint=f"With this tokenizer that alone takes {needed} tokens.",
        )


def _draw(
    kind: _Key, encode: Callable[[str], list[int]], places: int, seed: int, trial: int
) -> _Trial:
    rng = np.random.default_rng([seed, trial])
    start, drawn = int(rng.integers(places)), kind.draw(rng)
    closing, cue = encode(f"{kind.cue} {drawn}"), encode(kind.cue)
    # tokens may join the cue with the key: the key begins where the two encodings part
    shared = sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(closing, cue, strict=False)))
    # stated in the very tokens that are asked for, which a full stop might otherwise join
    return _Trial(start, closing + encode(".\n"), closing, len(closing) - shared)


def _sequence(
    trial: _Trial, haystack: Sequence[int], opening: Sequence[int], length: int, depth: float | None
) -> list[int]:
    """``length`` tokens: opening, text with the key stated at ``depth``, and the question.

    Without a depth the key is not stated, and text stands in its place.
    """
    needle = [] if depth is None else trial.needle
    room = length - len(opening) - len(needle) - len(trial.closing)
    around = [haystack[(trial.start + i) % len(haystack)] for i in range(room)]
    cut = round(room * (depth or 0) / 100)
    return [*opening, *around[:cut], *needle, *around[cut:], *trial.closing]


def _run(
    models: Sequence[Any],
    batches: Iterator[tuple[Tensor, Tensor]],
    trials: int,
    advance: Callable[[int], None],
) -> list[_Scores]:
    """Scores of each model on all sequences of one length, trial by trial."""
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in models]
    for tokens, counts in batches:
        for model, scored in zip(models, parts, strict=True):
            scored.append(_score(model, tokens, counts))
        advance(len(tokens))
    return [
        _Scores(*(torch.cat(column).view(trials, -1) for column in zip(*scored, strict=True)))
        for scored in parts
    ]


def _batches(sequences: Tensor, answers: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(sequences), batch):
        yield sequences[start : start + batch], answers[start : start + batch]


@torch.no_grad()
def _score(model: Any, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Log likelihood [B] in nats of the last ``answers`` [B] tokens, and whether all rank first.

    Only the logits of those positions are computed: those of a long text would fill the memory.
    """
    most = int(answers.max())
    tokens = tokens.to(model.device)
    logits = model(tokens, use_cache=False, logits_to_keep=most + 1).logits[:, :-1]
    targets = tokens[:, -most:]
    likely = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0].cpu()
    right = (logits.argmax(-1) == targets).cpu()
    asked = torch.arange(most) >= most - answers[:, None]
    return likely.where(asked, 0.0).sum(1), (right | ~asked).all(1)


def _exact(scores: _Scores) -> Tensor:
    return scores.exact[:, 1:].double()


def _log_likelihood(scores: _Scores) -> Tensor:
    return scores.log_likelihood[:, 1:]


def _gain(scores: _Scores) -> Tensor:
    return scores.log_likelihood[:, 1:] - scores.log_likelihood[:, :1]


def _cell(length: int, depth: float, column: int, scores: Sequence[_Scores]) -> Cell:
    def mean(measure: Callable[[_Scores], Tensor]) -> Mean:
        return _paired([measure(found)[:, column - 1] for found in scores])

    return Cell(
        length=length,
        depth=depth,
        exact=mean(_exact),
        log_likelihood=mean(_log_likelihood),
        gain=mean(_gain),
    )


def _overall(found: Sequence[Sequence[_Scores]], measure: Callable[[_Scores], Tensor]) -> Mean:
    """Over lengths and depths, one sample for each trial."""
    by_model = zip(*found, strict=True)
    return _paired([torch.cat([*map(measure, scores)], 1).mean(1) for scores in by_model])


def _paired(samples: Sequence[Tensor]) -> Mean:
    ours, *theirs = (column.tolist() for column in samples)
    return paired_mean(ours, theirs[0] if theirs else None)
