"""Which parameters are trained, from when on, and how fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

__all__ = ["Group", "Groups", "adapted_modules", "parameter_groups", "rate_factor"]

Groups = Literal["attention", "all", "attention-then-all"]
# CLA models want a higher rate than others (arXiv:2405.12981, section 3.4 and table 3)
_SHARING_RATE = 1.5


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are trained together.

    Args:
        name: For people.
        parameters: Of the model, by name.
        late: They wait for the second phase.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    late: bool


def parameter_groups(model: nn.Module, groups: Groups) -> list[Group]:
    """What is trained; all other parameters are frozen, in place.

    Only parameters that require gradients take part, such as adapters where there are some.

    Args:
        model: A causal LM, with or without adapters.
        groups: The recipe's key.
    """
    attention: dict[str, nn.Parameter] = {}
    for name, module in _attention_modules(model):
        attention |= {f"{name}.{key}": weight for key, weight in module.named_parameters()}
    rest = {name: weight for name, weight in model.named_parameters() if name not in attention}
    if groups == "attention":
        for weight in rest.values():
            weight.requires_grad_(False)
    found = [
        Group("attention", _trained(attention), late=False),
        Group("all others", _trained(rest), late=groups == "attention-then-all"),
    ]
    return [group for group in found if group.parameters]


def adapted_modules(model: Any, groups: Groups) -> list[str]:
    """Names of the modules that get adapters: matrices of the attention, or of all layers."""
    attention = tuple(f"{name}." for name, _ in _attention_modules(model))
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D"}
        and module is not head
        and (groups != "attention" or name.startswith(attention))
    ]


def rate_factor(config: Any) -> float:
    """Factor of the learning rate for a model: higher where layers share keys and values.

    Args:
        config: Of transformers, or the parsed config.json.
    """
    sources = (
        config.get("kv_source_layers")
        if isinstance(config, Mapping)
        else getattr(config, "kv_source_layers", None)
    )
    return _SHARING_RATE if sources is not None else 1.0


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are called attention by their class."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and not name.startswith(inside or ("\0",)):
            inside = (*inside, f"{name}.")
            yield name, module


def _trained(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in parameters.items() if weight.requires_grad}
