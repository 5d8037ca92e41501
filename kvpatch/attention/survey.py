"""The attention modules of a model: which can be patched, and what each will run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpatch.attention import fused
from kvpatch.attention.latent import LatentClass
from kvpatch.attention.masks import alibi_is_rounded
from kvpatch.attention.stock import Swapped
from kvpatch.attention.swapping import stock_class
from kvpatch.models.absorbed_kvpatch import beyond_weight
from kvpatch.models.families_kvpatch import PREFIX
from kvpatch.models.latent_kvpatch import LatentAttention

__all__ = ["Attention", "Report", "Route", "attentions", "report_on"]

_NAME = re.compile(r"Attention\d*$")
_MANY = 4096  # tokens of a prompt, for the question what computes one
_TORCH = "torch"
_ALIBI = frozenset({"bloom", "mpt"})  # models with slopes


@dataclass(frozen=True, slots=True)
class Route:
    """What an attention module runs.

    Args:
        prefill: The op for many queries, in training too; ``torch``, or ``stock`` if the module is
            not patched.
        decode: The one for few queries and a cache.
        why: Why kernels do not compute all of it, or None if they do.
    """

    prefill: str
    decode: str
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What the attention modules of a model run.

    Args:
        modules: The route of each, by its name in the model.
    """

    modules: Mapping[str, Route]

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of the modules all of whose attention kernels compute."""
        return tuple(name for name, route in self.modules.items() if route.why is None)

    def __str__(self) -> str:
        """One line for each route, with the number of modules and the name of the first."""
        names: dict[Route, list[str]] = {}
        for name, route in self.modules.items():
            names.setdefault(route, []).append(name)
        lines = [
            f"kernels compute all attention of {len(self.fused)} of {len(self.modules)} modules"
        ]
        for route, (first, *others) in names.items():
            more = f" and {len(others)} more" if others else ""
            why = f"; {route.why}" if route.why else ""
            lines.append(f"{first}{more}: prefill {route.prefill}, decode {route.decode}{why}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention module.

    Args:
        name: In the model.
        module: Itself.
        config: The one that names its attention function; None outside of any model.
        refusal: Why it cannot be patched, or None if it can or is.
    """

    name: str
    module: Any
    config: Any
    refusal: str | None


def attentions(model: nn.Module) -> list[Attention]:
    """All attention modules in a module, in their order.

    A mask is made for all that share a config, so that none of them can be patched alone.
    """
    owners = dict[str, PreTrainedModel]()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        if _is_attention(module) and not any(map(_is_attention, _parts(module))):
            owner = next((owners[path] for path in _above(name) if path in owners), None)
            config = getattr(module, "config", None) or getattr(owner, "config", None)
            refusal = "it is in no model of transformers" if owner is None else None
            found.append(Attention(name, module, config, refusal or _refusal(module, config)))
    refused = {id(a.config): a for a in found if a.refusal is not None and a.config is not None}
    return [
        replace(a, refusal=f"it has the masks of {refused[id(a.config)].name}, which cannot be")
        if a.refusal is None and id(a.config) in refused
        else a
        for a in found
    ]


def report_on(found: list[Attention]) -> Report:
    """What modules will run once those that can be are patched."""
    return Report(
        {
            a.name: _route(a) if a.refusal is None else Route("stock", "stock", a.refusal)
            for a in found
        }
    )


def _is_attention(module: nn.Module) -> bool:
    return _NAME.search(type(module).__name__) is not None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if part is not module)


def _above(name: str) -> Iterator[str]:
    """The names of all modules that a named one is in, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _refusal(module: Any, config: Any) -> str | None:
    kind: Any = type(module)
    if isinstance(module, Swapped):
        return None
    asks, known = _asks(kind), stock_class(kind) is not None
    slow = getattr(module, "pretraining_tp", 1) > 1 and module.slow_but_exact
    reasons = {
        "its ALiBi biases are rounded position by position, which slopes cannot say": (
            alibi_is_rounded(config)
        ),
        "it selects keys by an indexer, which reads a dense mask": hasattr(module, "indexer"),
        "slow_but_exact splits its output projection": slow,
        f"{kind.__name__} asks for no attention function, and is not known here": (
            not (asks or known)
        ),
        "its forward was replaced, by hooks for example": not asks and "forward" in vars(module),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@cache
def _asks(kind: type[nn.Module]) -> bool:
    """Whether a class asks transformers for the attention function that its config names."""
    classes = (base for base in kind.__mro__ if base not in nn.Module.__mro__)
    return any("ALL_ATTENTION_FUNCTIONS" in _source(base) for base in classes)


def _source(kind: type[Any]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time
        return ""


def _route(attention: Attention) -> Route:
    module, config = attention.module, attention.config
    if getattr(module, "sinks", None) is not None:
        return Route(_TORCH, _TORCH, "it has attention sinks")
    like = next(module.parameters(), torch.empty(0))
    latent = _latent_widths(module)
    if latent is not None:
        return _latent_route(module.kv_b_proj, like, config, latent)
    width = _width(module, config)
    value_width = getattr(module, "v_head_dim", width)
    groups = getattr(module, "num_key_value_groups", 1)
    prefill, decode = (
        fused.choose(
            _empty(like, groups, tokens, width),
            _empty(like, 1, tokens, width),
            _empty(like, 1, tokens, value_width),
        )
        for tokens in (_MANY, 1)
    )
    return Route(_runs(*prefill), _runs(*decode), prefill[1] or decode[1])


def _latent_route(kv_b_proj: nn.Module, like: Tensor, config: Any, widths: _Widths) -> Route:
    heads = config.num_attention_heads
    slopes = like if config.model_type.removeprefix(PREFIX) in _ALIBI else None
    apart = widths.rope > 0 and widths.nope > 0 and not widths.joined
    width = widths.nope if apart else widths.nope + widths.rope
    rope = _empty(like, heads, _MANY, widths.rope)
    keys, values = (_empty(like, heads, _MANY, each) for each in (width, widths.value))
    prefill, why = fused.choose(keys.clone(), keys, values, query_rope=rope if apart else None)
    prefill = _runs(prefill, why)
    beyond = beyond_weight(kv_b_proj)
    if beyond is not None:
        return Route(prefill, f"{prefill}, expanded", why or beyond)
    latents = _empty(like, 1, _MANY, widths.rank)
    query = _empty(like, heads, 1, widths.rank)
    decode, obstacle = fused.choose(query, latents, latents, query_rope=rope, slopes=slopes)
    decode = f"{_TORCH}, on latents" if obstacle is not None else decode
    return Route(prefill, decode, why or obstacle)


@dataclass(frozen=True, slots=True)
class _Widths:
    """Widths of latent attention.

    Args:
        rank: Of latents.
        rope: Of rotary keys.
        nope: Of the rest of keys.
        value: Of values.
        joined: Expanded, every head has a rotary key of its own, as scales differ.
    """

    rank: int
    rope: int
    nope: int
    value: int
    joined: bool = False


def _latent_widths(module: Any) -> _Widths | None:
    """The widths of a module that attends to latents, or None of any other."""
    if _is_ours(type(module)):
        widths = module.rank, module.rope_dim, module.nope_dim, module.value_dim
        return _Widths(*widths, joined=module.scales > 1)
    row = module.row if isinstance(module, Swapped) else stock_class(type(module))
    if not isinstance(row, LatentClass) or "forward" in vars(module):
        return None
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return _Widths(*(getattr(module, name) for name in names))


def _is_ours(kind: type[nn.Module]) -> bool:
    """Whether it is our latent class; the copy in a checkpoint may be in use instead."""
    return any(base.__name__ == LatentAttention.__name__ for base in kind.__mro__)


def _width(module: Any, config: Any) -> int:
    for name in ("qk_head_dim", "head_dim", "head_size"):
        width = getattr(module, name, None) or getattr(config, name, None)
        if width:
            return int(width)
    return int(config.hidden_size // config.num_attention_heads)


def _runs(op: str, why: str | None) -> str:
    return op if why is None else _TORCH


def _empty(like: Tensor, heads: int, tokens: int, width: int) -> Tensor:
    """Heads of no sequence at all: shapes are what an op is chosen by."""
    # not a relative of ``like``, which may be sharded
    made = torch.empty(0, heads, tokens, width, dtype=like.dtype, device=like.device)
    return fused.autocast(made)
