"""Fused attention in a loaded model: put it in, take it out.

Models that ask for an attention function are set to ours. In those that do not, and in stock MLA
models, the class of the attention modules changes too. Either way it is one instance: weights,
cache and other models stay as they are, and nothing of it is saved with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvpatch.attention.stock import Swapped
from kvpatch.attention.survey import Attention, Report, attentions, report_on
from kvpatch.attention.swapping import stock_class, swapped_class
from kvpatch.errors import UsageError
from kvpatch.models.scores_kvpatch import FUSED

__all__ = ["Report", "patch", "patched", "unpatch"]

# of a patched module: the attention function that its model was set to before
_BEFORE = "_kvpatch_before"


def patch(model: nn.Module, *, strict: bool = False) -> Report:
    """Let a model attend by our kernels, with the same weights and the same outputs.

    A second call changes nothing more. What kernels cannot do, torch does; the report says so now,
    and a warning when it happens.

    Args:
        model: A loaded model of transformers, or a module that has one in it.
        strict: Fail unless kernels can do all of the attention. What a call asks for later is not
            known yet: dropout, returned weights or a dense mask still fall back, with a warning.

    Returns:
        What each attention module runs from now on.

    Raises:
        UsageError: If nothing can be patched, or not everything with ``strict``; the model is as
            it was then.
    """
    found = attentions(model)
    report = report_on(found)
    chosen = [attention for attention in found if attention.refusal is None]
    if not chosen:
        raise UsageError(
            f"no attention module of this {type(model).__name__} can be patched"
            + "".join(f"; {a.name}: {a.refusal}" for a in found),
            hint="Patch a model of transformers whose attention is known; see the documentation.",
        )
    if strict and any(route.why is not None for route in report.modules.values()):
        raise UsageError(
            f"kernels cannot do all of the attention of this model:\n{report}",
            hint="Without strict=True torch does the rest.",
        )
    new = [attention for attention in chosen if not hasattr(attention.module, _BEFORE)]
    own = _own_configs(model, new)
    for attention in new:
        attention.module.__dict__[_BEFORE] = attention.config._attn_implementation
        own[id(attention.config)]._attn_implementation_internal = FUSED
        row = stock_class(type(attention.module))
        if row is not None and "forward" not in vars(attention.module):
            attention.module.__class__ = swapped_class(row)
    return report


def unpatch(model: nn.Module) -> tuple[str, ...]:
    """Give every patched module its stock class and its attention function back.

    Args:
        model: As for ``patch``.

    Returns:
        Names of the modules that were patched.

    Raises:
        UsageError: If the forward of a patched module was replaced since, which would keep ours.
    """
    found = _patched_modules(model)
    _restore(found)
    return tuple(attention.name for attention in found)


@contextmanager
def patched(model: nn.Module, *, strict: bool = False) -> Iterator[Report]:
    """Patch for the length of a ``with`` block; what was patched before stays patched.

    Args:
        model: As for ``patch``.
        strict: As for ``patch``.

    Yields:
        The report of ``patch``.

    Raises:
        UsageError: As ``patch`` and ``unpatch`` do.
    """
    before = {attention.name for attention in _patched_modules(model)}
    report = patch(model, strict=strict)
    try:
        yield report
    finally:
        _restore([a for a in _patched_modules(model) if a.name not in before])


def _patched_modules(model: nn.Module) -> list[Attention]:
    return [a for a in attentions(model) if hasattr(a.module, _BEFORE)]


def _own_configs(model: nn.Module, chosen: list[Attention]) -> dict[int, Any]:
    """Give a model configs of its own, which other models may have had, too.

    Returns:
        The new config for the id of each that a chosen module had.
    """
    copies: dict[int, Any] = {}
    if chosen:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                copy.deepcopy(module.config, copies)
    for attention in chosen:
        copy.deepcopy(attention.config, copies)
    for module in model.modules():
        for name, held in vars(module).items():
            if isinstance(held, PreTrainedConfig) and id(held) in copies:
                module.__dict__[name] = copies[id(held)]
    return copies


def _restore(found: list[Attention]) -> None:
    """Undo what was done to modules; to all of them or none."""
    for attention in found:
        if isinstance(attention.module, Swapped) and "forward" in vars(attention.module):
            raise UsageError(
                f"the forward of {attention.name} was replaced after it was patched",
                hint="Remove the hooks that replaced it, then unpatch.",
            )
    for attention in found:
        before = attention.module.__dict__.pop(_BEFORE)
        if attention.config._attn_implementation == FUSED:  # else it was set since
            attention.config._attn_implementation_internal = before
        if isinstance(attention.module, Swapped):
            attention.module.__class__ = attention.module.stock  # type: ignore[assignment]
