"""A student and its teacher as one module, so that what wraps it sees the whole forward pass."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convert.training.data import IGNORED, Batch
from convert.training.losses import Head, hidden_errors, token_losses
from kvpatch.errors import InputModelError

__all__ = ["Distillation", "Losses", "Weights", "head_of", "packs"]

_PROBE = 8  # tokens of each half of the probe for packing


class Weights(NamedTuple):
    """What each loss counts for."""

    kl: float
    ce: float
    hidden_mse: float


class Losses(NamedTuple):
    """Sums over the tokens that have a target; ``total`` is weighted and has gradients."""

    total: Tensor
    kl: Tensor
    ce: Tensor
    hidden_mse: Tensor


class Distillation(nn.Module):
    """The losses of a student on a batch.

    Args:
        student: A causal LM of transformers.
        teacher: Another with the same vocabulary, or None; none of its weights are parameters of
            this module.
        packed: Sequences hold several documents, told apart by their positions.
    """

    def __init__(self, student: Any, teacher: Any | None, *, packed: bool) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple, where torch does not look for modules
        self._packed = packed

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes that accelerate shards one by one: the layers of the student."""
        return list(self.student._no_split_modules or ())

    def forward(
        self, tokens: Tensor, positions: Tensor, targets: Tensor, weights: Weights
    ) -> Losses:
        """Losses of a batch [B, T].

        Args:
            tokens: Token ids.
            positions: Of each token in its document.
            targets: Next tokens, or ``IGNORED``.
            weights: Of the losses.
        """
        batch = Batch(tokens, positions, targets)
        rows = targets != IGNORED
        layers = bool(weights.hidden_mse)
        ours = self._hidden(self.student, batch, layers)
        teacher, theirs = self._teacher[0], None
        if teacher is not None and (weights.kl or layers):
            with torch.no_grad():
                theirs = self._hidden(teacher, batch, layers)
        kl, ce = token_losses(
            ours[-1][rows],
            head_of(self.student),
            targets[rows],
            theirs[-1][rows] if theirs is not None else None,
            head_of(teacher) if theirs is not None else None,
        )
        errors = torch.zeros_like(ce)
        if layers and theirs is not None:
            errors = hidden_errors([x[rows] for x in ours], [x[rows] for x in theirs])
        total = weights.ce * ce.sum()
        if theirs is not None:
            total = total + weights.kl * kl.sum()
        if layers:
            total = total + weights.hidden_mse * errors.sum()
        return Losses(total, kl.detach().sum(), ce.detach().sum(), errors.detach().sum())

    def _hidden(self, model: Any, batch: Batch, layers: bool) -> tuple[Tensor, ...]:
        """Hidden states [B, T, E] after each layer, or after the last alone."""
        places = {"position_ids": batch.positions} if self._packed else {}
        output = model.base_model(
            batch.tokens, use_cache=False, output_hidden_states=layers, **places
        )
        last: Tensor = output.last_hidden_state
        return (*output.hidden_states[1:-1], last) if layers else (last,)


def head_of(model: Any) -> Head:
    """The output head of a causal LM, with what its class does to logits."""
    layer, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1)
    scale /= float(getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, cap)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Refuse a model whose logits are not those of its head, as far as ``head_of`` knows it.

    Raises:
        InputModelError: Naming the class.
    """
    tokens = _random_tokens(model, _PROBE)
    logits = model(tokens, use_cache=False).logits.float()
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    made = head_of(model).logits(hidden).float()
    error = (made - logits).abs().max() / logits.abs().max()
    if not error <= 8 * torch.finfo(hidden.dtype).eps ** 0.5:
        raise InputModelError(
            f"{type(model).__name__} does something to its logits that uptraining does not know",
            hint="Train it with another trainer; see recipes/uptraining/other-trainers.md.",
        )


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether documents in one sequence stay apart when positions begin anew.

    Measured: the second of two documents, after the first, against the same document alone. A
    class that takes no positions, or looks back over the boundary, gets one document a sequence.
    """
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return False
    tokens = _random_tokens(model, 2 * _PROBE)
    alone = _last_hidden(model, tokens[:, _PROBE:])
    places = torch.arange(2 * _PROBE, device=tokens.device)[None]
    together, leaking = (
        _last_hidden(model, tokens, positions)[:, _PROBE:]
        for positions in (places % _PROBE, places)
    )
    error, leak = ((x - alone).abs().max() for x in (together, leaking))
    return bool(error < 0.05 * leak)


def _last_hidden(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    output = model.base_model(tokens, use_cache=False, position_ids=positions)
    hidden: Tensor = output.last_hidden_state.float()
    return hidden


def _random_tokens(model: Any, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, count), generator=generator)
    return tokens.to(model.device)
