"""Absorbed decoding in a loaded stock model: put it in, take it out.

Only the class of attention modules changes, one instance at a time: weights, cache, configuration
and other models stay as they are, and nothing of it is saved with the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvpatch.attention.latent import (
    STOCK,
    AbsorbedDecoding,
    absorbed_class,
    obstacle,
    stock_class,
)
from kvpatch.errors import UsageError

__all__ = ["Report", "patch", "patched", "unpatch"]


@dataclass(frozen=True, slots=True)
class Report:
    """What the attention modules of a model run, by their names in the model.

    Args:
        absorbed: Modules that decode in the absorbed form, with the class they are from.
        expanded: Modules that are patched and still decode in the expanded form, with what stands
            in the way; they change over as soon as it does not.
        left: Modules that are not patched, with the reason.
    """

    absorbed: Mapping[str, str]
    expanded: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        modules = len(self.absorbed) + len(self.expanded) + len(self.left)
        lines = [f"{len(self.absorbed)} of {modules} attention modules decode in absorbed form"]
        lines += [f"{name}: expanded, {why}" for name, why in self.expanded.items()]
        lines += [f"{name}: not patched, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def patch(model: nn.Module, *, strict: bool = False) -> Report:
    """Let a stock MLA model decode on its latents, with the same weights and the same outputs.

    Training, prefill and saving stay as they are. A second call changes nothing more.

    Args:
        model: A loaded model, or a module that has one in it.
        strict: Fail unless every attention module decodes in the absorbed form.

    Returns:
        What each attention module runs from now on.

    Raises:
        UsageError: If nothing can be patched, or not everything with ``strict``; the model is as
            it was then.
    """
    report, modules = _plan(model)
    if not modules:
        known = ", ".join(row.name for row in STOCK)
        raise UsageError(
            f"no attention module of this {type(model).__name__} can be patched"
            + "".join(f"; {name}: {why}" for name, why in report.left.items()),
            hint=f"Absorbed decoding is for the attention classes {known}.",
        )
    if strict and (report.expanded or report.left):
        raise UsageError(
            f"not every attention module can decode in absorbed form: {report}",
            hint="Without strict=True the rest of the model is patched.",
        )
    for module in modules:
        _swap(module)
    return report


def unpatch(model: nn.Module) -> tuple[str, ...]:
    """Give every patched module its stock class back.

    Args:
        model: As for ``patch``.

    Returns:
        Names of the modules that were patched.

    Raises:
        UsageError: If the forward of a patched module was replaced since, which would keep ours.
    """
    found = _patched_modules(model)
    _restore(found)
    return tuple(found)


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
    before = _patched_modules(model)
    report = patch(model, strict=strict)
    ours = {name: m for name, m in _patched_modules(model).items() if name not in before}
    try:
        yield report
    finally:
        _restore(ours)


def _plan(model: nn.Module) -> tuple[Report, list[nn.Module]]:
    """What each attention module will run, and those that run it with our class."""
    absorbed, expanded, left = dict[str, str](), dict[str, str](), dict[str, str]()
    modules = []
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Attention"):
            continue
        if (why := _refusal(module)) is not None:
            left[name] = why
            continue
        modules.append(module)
        why = obstacle(module)
        (absorbed if why is None else expanded)[name] = why or _stock_name(module)
    return Report(absorbed, expanded, left), modules


def _patched_modules(model: nn.Module) -> dict[str, AbsorbedDecoding]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AbsorbedDecoding)}


def _refusal(module: nn.Module) -> str | None:
    """Why a module cannot be patched, or None if it can or is."""
    kind = type(module)
    if isinstance(module, AbsorbedDecoding):
        return None
    if stock_class(kind) is None:
        latents = hasattr(module, "kv_b_proj")
        return f"{kind.__name__} {'has no absorbed form here' if latents else 'has no latents'}"
    return "its forward was replaced, by hooks for example" if "forward" in vars(module) else None


def _stock_name(module: nn.Module) -> str:
    return (module.stock if isinstance(module, AbsorbedDecoding) else type(module)).__name__


def _swap(module: nn.Module) -> None:
    row = stock_class(type(module))
    if row is not None:  # else it is patched already
        module.__class__ = absorbed_class(row)


def _restore(modules: Mapping[str, Any]) -> None:
    """Give modules their stock class back; all of them or none."""
    for name, module in modules.items():
        if "forward" in vars(module):
            raise UsageError(
                f"the forward of {name} was replaced after it was patched",
                hint="Remove the hooks that replaced it, then unpatch.",
            )
    for module in modules.values():
        module.__class__ = module.stock
