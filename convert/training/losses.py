"""Losses of a student that learns from a teacher, one for each token.

Logits are made for a few columns of the vocabulary at a time, so that those of a whole batch never
exist: forward and backward hold 4 N V' bytes of them for N tokens and V' columns, not 4 N V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Head", "hidden_errors", "token_losses"]

_COLUMNS = 4096


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states: ``cap tanh(scale (W h + b) / cap)``.

    Args:
        weight: [V, E].
        bias: [V], or None.
        scale: Factor of the logits.
        cap: Bound of the logits (softcap), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """Logits [N, V'] of hidden states [N, E], float64 of float64 and float32 of all others."""
        made = hidden @ self.weight[columns].T
        made = made.to(torch.promote_types(made.dtype, torch.float32))
        if self.bias is not None:
            made = made + self.bias[columns]
        made = made * self.scale
        return made if self.cap is None else self.cap * torch.tanh(made / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of logits by what the matrix gives, [N, V']."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


def token_losses(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    taught: Tensor | None = None,
    teacher: Head | None = None,
    *,
    columns: int = _COLUMNS,
) -> tuple[Tensor, Tensor]:
    """Forward KL to a teacher and cross entropy, in nats.

    Hidden states and weight are cast to the dtype of autocast where that is on.

    Args:
        hidden: [N, E] of the student.
        head: Of the student; gradients flow to its weight and bias.
        targets: [N] next tokens.
        taught: [N, E'] hidden states of the teacher, or None for cross entropy alone.
        teacher: Head of the teacher; no gradient flows to it.
        columns: Columns of the vocabulary at a time.

    Returns:
        KL(teacher || student) [N], 0 without a teacher; cross entropy [N].
    """
    kind = hidden.device.type
    weight = head.weight
    if torch.is_autocast_enabled(kind):
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    with torch.autocast(kind, enabled=False):
        kl, ce = _TokenLosses.apply(  # type: ignore[no-untyped-call]
            hidden.to(weight.dtype), weight, head.bias, head, targets, taught, teacher, columns
        )
    return kl, ce


def hidden_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of hidden states as a share of the teacher's square, mean over the layers.

    Args:
        student: [N, E] after each layer.
        teacher: The same of the teacher.

    Returns:
        [N], in float32 at least.
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        wide = torch.promote_types(ours.dtype, torch.float32)
        truth = theirs.to(wide)
        errors.append((ours.to(wide) - truth).square().sum(-1) / truth.square().sum(-1))
    return torch.stack(errors).mean(0)


class _TokenLosses(torch.autograd.Function):
    """Two passes over the vocabulary: sums in ``forward``, gradients in ``backward``.

    With p and q the softmax of teacher logits t and student logits z:
    KL = sum p (t - z) - lse(t) + lse(z), and its gradient by z is q - p.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes arguments by place
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        form: Head,
        targets: Tensor,
        taught: Tensor | None,
        teacher: Head | None,
        columns: int,
    ) -> tuple[Tensor, Tensor]:
        """See ``token_losses``."""
        head = Head(weight, bias, form.scale, form.cap)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        zeros = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        ours, theirs, gap = zeros - torch.inf, zeros - torch.inf, zeros
        chosen = torch.zeros_like(zeros)
        for part, inside, place in _parts(len(weight), targets, columns):
            logits = head.logits(hidden, part)
            ours = torch.logaddexp(ours, logits.logsumexp(-1))
            chosen = chosen + torch.where(inside, logits.gather(1, place)[:, 0], 0)
            if taught is not None and teacher is not None:
                truth = teacher.logits(taught, part).to(dtype)
                sum_ = torch.logaddexp(theirs, truth.logsumexp(-1))
                share = (truth - sum_[:, None]).exp()
                gap = gap * (theirs - sum_).exp() + (share * (truth - logits)).sum(-1)
                theirs = sum_
        ctx.save_for_backward(hidden, weight, bias, targets, taught, ours, theirs)
        ctx.form, ctx.teacher, ctx.columns = form, teacher, columns
        kl = gap - theirs + ours if taught is not None else zeros
        return kl, ours - chosen

    @staticmethod
    def backward(ctx: Any, kl: Tensor, ce: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        hidden, weight, bias, targets, taught, ours, theirs = ctx.saved_tensors
        head = Head(weight, bias, ctx.form.scale, ctx.form.cap)
        by_hidden = torch.zeros(hidden.shape, dtype=ours.dtype, device=hidden.device)
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        kl = kl if taught is not None else torch.zeros_like(kl)
        for part, inside, place in _parts(len(weight), targets, ctx.columns):
            logits = head.logits(hidden, part)
            slope = (kl + ce)[:, None] * (logits - ours[:, None]).exp()
            if taught is not None:
                truth = ctx.teacher.logits(taught, part).to(logits.dtype)
                slope -= kl[:, None] * (truth - theirs[:, None]).exp()
            slope.scatter_add_(1, place, torch.where(inside, -ce, 0)[:, None])
            slope = slope * head.slope(logits)
            narrow = slope.to(hidden.dtype)
            by_hidden += narrow @ weight[part]
            if by_weight is not None:
                by_weight[part] = narrow.T @ hidden
            if by_bias is not None:
                by_bias[part] = slope.sum(0)
        return by_hidden.to(hidden.dtype), by_weight, by_bias, None, None, None, None, None


def _parts(
    vocabulary: int, targets: Tensor, columns: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of the vocabulary; which targets [N] lie inside, and their columns [N, 1] there."""
    for start in range(0, vocabulary, columns):
        part = slice(start, min(start + columns, vocabulary))
        inside = (targets >= part.start) & (targets < part.stop)
        yield part, inside, torch.where(inside, targets - start, 0)[:, None]
