"""Quality on a text: perplexity, and against the source mean KL and top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from convert.lengths import check_pair, config_of, position_limit
from convert.loading import Pair, load_pair, quiet_transformers
from convert.resources import check_ram
from convert.texts import Text, read_text
from convert.tokens import TextTokens, embedding_rows
from kvpatch.errors import InputModelError, UsageError, VerificationError

__all__ = ["Against", "Evaluation", "evaluate_checkpoint", "measure_text", "windows_of"]

# float32 arrays [windows, context, vocabulary] that are alive at once: the logits, those of the
# scored positions, their log softmax; with a source one of its own and two inside the KL
_COPIES, _COPIES_WITH_SOURCE = 3, 5


@dataclass(frozen=True, slots=True)
class Against:
    """How a model differs from the one it was made from, on the tokens that were scored.

    Args:
        perplexity: Of the source.
        kl: Mean of KL(source || model) over the positions, in nats.
        top1: Share of positions at which both rank the same token first.
    """

    perplexity: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A measurement and everything that is needed to repeat it.

    Args:
        text: File name of the text.
        text_sha256: Hash of its bytes.
        windows: Number of windows.
        context: Tokens of a window.
        stride: Tokens between the starts of two windows; of their overlap only the later
            window's new tokens are scored.
        tokens: Tokens that were scored.
        dtype: Dtype in which the models ran.
        nll: Mean negative log likelihood in nats per token.
        perplexity: Its exponential.
        against: Comparison with the source, if one was given.
    """

    text: str
    text_sha256: str
    windows: int
    context: int
    stride: int
    tokens: int
    dtype: str
    nll: float
    perplexity: float
    against: Against | None


@dataclass(slots=True)
class _Sums:
    tokens: int = 0
    nll: float = 0.0
    source_nll: float = 0.0
    kl: float = 0.0
    agree: int = 0


def evaluate_checkpoint(
    folder: Path,
    text: Path,
    *,
    against: Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    samples: int | None = None,
    batch: int = 8,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a model on a text: ``load_pair`` and ``measure_text`` in one.

    Args:
        folder: Checkpoint folder.
        text: Text, json, jsonl or parquet file.
        against: Folder of the source, to compare with.
        context: See ``measure_text``, as for the others.
        stride: Tokens from one window to the next.
        samples: Use only the first windows.
        batch: Windows in one forward pass.
        device: Where the models run.
        dtype: Dtype they run in; float32 on the CPU and the checkpoint's elsewhere.
        progress: Called with windows done and in all.
        warn: Called with each warning.

    Raises:
        KvpatchError: Those of ``read_text``, ``load_pair`` and ``measure_text``.
    """
    content = read_text(text)
    for warning in content.warnings:
        if warn is not None:
            warn(warning)
    pair = load_pair(folder, against, dtype=dtype, device=device)
    return measure_text(
        pair,
        content,
        context=context,
        stride=stride,
        samples=samples,
        batch=batch,
        progress=progress,
        warn=warn,
    )


def measure_text(
    pair: Pair,
    text: Text,
    *,
    context: int | None = None,
    stride: int | None = None,
    samples: int | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a loaded model on a text, against the source if there is one.

    Args:
        pair: Model and source.
        text: The text.
        context: Tokens of a window; 512, or what the model was made for, if not given.
        stride: Tokens from one window to the next; ``context``, without overlap, if not given.
        samples: Use only the first windows.
        batch: Windows in one forward pass.
        progress: Called with windows done and in all.
        warn: Called with each warning.

    Raises:
        UsageError: If context or stride make no sense for the model.
        InputModelError: If the text is too short, or has tokens that a model has no row for.
        ResourceError: If the logits of a batch do not fit into memory.
        VerificationError: If a model gives logits that are not finite.
    """
    if context is None:
        context = min(512, position_limit(config_of(pair.model)))
    stride = context if stride is None else stride
    _check_windows(context, stride)
    for warning in check_pair(pair, context, f"--context {context}"):
        if warn is not None:
            warn(warning)
    with quiet_transformers():
        encode = TextTokens(pair.tokenizer, embedding_rows(pair.model, pair.source), text.name)
        ids = torch.tensor(encode.joined(text.documents), dtype=torch.long)
        prefix = torch.tensor(encode.opening, dtype=torch.long)
        inputs = windows_of(ids, prefix, context=context, stride=stride)[:samples]
        if not len(inputs):
            raise InputModelError(f"{text.name} has {len(ids)} tokens, less than one window")
        _check_logits(pair, min(batch, len(inputs)), context)
        sums = _Sums()
        for count, (tokens, scored) in enumerate(_batches(inputs, context, stride, batch), 1):
            _score(sums, tokens.to(pair.model.device), scored, pair.model, pair.source)
            if progress is not None:
                progress(min(count * batch, len(inputs)), len(inputs))
    nll = sums.nll / sums.tokens
    if not math.isfinite(nll):
        raise VerificationError(f"{pair.name} gives logits that are NaN or infinite on {text.name}")
    comparison = None
    if pair.source is not None:
        comparison = Against(
            perplexity=_exp(sums.source_nll / sums.tokens),
            kl=sums.kl / sums.tokens,
            top1=sums.agree / sums.tokens,
        )
    return Evaluation(
        text=text.name,
        text_sha256=text.sha256,
        windows=len(inputs),
        context=context,
        stride=stride,
        tokens=sums.tokens,
        dtype=str(pair.model.dtype).removeprefix("torch."),
        nll=nll,
        perplexity=_exp(nll),
        against=comparison,
    )


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def windows_of(ids: Tensor, prefix: Tensor, *, context: int, stride: int) -> Tensor:
    """Cut a token sequence into full windows.

    Args:
        ids: [N] tokens of the text.
        prefix: [P] tokens that open every window, such as a beginning-of-text token; may be empty.
        context: Tokens of a window, prefix included.
        stride: Tokens between the starts of two windows.

    Returns:
        [W, context] windows; a rest that does not fill a window is left out.
    """
    body = context - len(prefix)
    if body < 1 or len(ids) < body:
        return ids.new_empty((0, context))
    cut = ids.unfold(0, body, min(stride, body))
    return torch.cat([prefix.expand(len(cut), -1), cut], 1)


def _batches(
    inputs: Tensor, context: int, stride: int, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows with a mask [W, context - 1] of the predictions to score."""
    scored = torch.ones(len(inputs), context - 1, dtype=torch.bool)
    scored[1:, : context - 1 - min(stride, context - 1)] = False
    for start in range(0, len(inputs), batch):
        yield inputs[start : start + batch], scored[start : start + batch]


@torch.no_grad()
def _score(sums: _Sums, tokens: Tensor, scored: Tensor, model: Any, source: Any) -> None:
    targets = tokens[:, 1:][scored]
    rows = torch.arange(len(targets))
    logits = _log_probabilities(model, tokens, scored)
    sums.tokens += len(targets)
    sums.nll -= float(logits[rows, targets].double().sum())
    if source is None:
        return
    truth = _log_probabilities(source, tokens, scored)
    sums.source_nll -= float(truth[rows, targets].double().sum())
    sums.kl += float(F.kl_div(logits, truth, reduction="sum", log_target=True))
    sums.agree += int((logits.argmax(-1) == truth.argmax(-1)).sum())


def _log_probabilities(model: Any, tokens: Tensor, scored: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits[:, :-1]
    return logits[scored.to(logits.device)].float().log_softmax(-1)


def _check_windows(context: int, stride: int) -> None:
    if not (context >= 2 and 1 <= stride <= context):
        raise UsageError(
            f"--context {context} --stride {stride} does not work",
            hint="Needed: 2 <= context and 1 <= stride <= context.",
        )


def _check_logits(pair: Pair, windows: int, context: int) -> None:
    """Refuse a batch whose logits do not fit into memory; those of the weights are there."""
    if pair.model.device.type != "cpu":
        return
    vocabulary = pair.model.config.get_text_config().vocab_size
    copies = _COPIES if pair.source is None else _COPIES_WITH_SOURCE
    check_ram(
        copies * windows * context * vocabulary * torch.float32.itemsize,
        None,
        what=f"scoring {windows} windows of {context} tokens at once",
        hint="Use a smaller --batch or --context.",
    )
