"""Stock transformers models as the truth: made, loaded in real float64, and changed in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.tiny import family

__all__ = [
    "Checkpoints",
    "Conversions",
    "Float64",
    "attentions",
    "change_kv_heads",
    "full_logits",
    "load",
    "make",
    "random_ids",
]

# what the fixtures of conftest.py are: folders by model name, and by source, KV heads and merge
Checkpoints = Callable[[str], Path]
Conversions = Callable[..., Path]

# Weights are multiples of this, so that the mean of 2 or 4 of them is exact in float32, whatever
# the order of the sum.
_GRID = 2.0**-10


class Float64(TorchFunctionMode):
    """Keep float64 where the stock classes go down to float32 (norms, softmax, positions).

    Then two ways to compute the same function agree to 1e-10, far below the 1e-4 and more that any
    wrong weight makes.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        return func(
            *(_widen(value) for value in args),
            **{key: _widen(value) for key, value in (kwargs or {}).items()},
        )


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def make(name: str, settings: Mapping[str, Any], *, seed: int = 0) -> Any:
    """A stock model with random weights: biases and norms too, so that each one matters."""
    config = CONFIG_MAPPING[family(name)](**settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in key and key.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif key.endswith("bias"):
                noise *= 0.3
            else:
                noise *= weight.shape[-1] ** -0.5
            weight.copy_((noise / _GRID).round() * _GRID)
    return model


def load(folder: Path) -> Any:
    """The stock model of a folder in float64; fails on a missing, unexpected or mismatched key.

    Runs eagerly, because fused attention and expert kernels have no such precision.
    """
    with Float64():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    assert not any(report.values()), report
    return model.eval()


def random_ids(model: Any, tokens: int = 9, *, batch: int = 2, seed: int = 1) -> Tensor:
    """Token ids [B, T] without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator)


@torch.no_grad()
def full_logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits [B, T, vocabulary] of one forward without a cache."""
    with Float64():
        logits: Tensor = model(ids, use_cache=False, **inputs).logits
    return logits


def attentions(model: Any) -> list[Any]:
    """The attention module of every layer."""
    return [layer.self_attn for layer in model.model.layers]


@torch.no_grad()
def change_kv_heads(
    model: Any, groups: int, merge: Callable[[Tensor], Tensor], *, dtype: torch.dtype
) -> None:
    """Give all KV heads of a group the same weights, biases and norms, in place.

    Args:
        model: Any stock model of the table.
        groups: Groups of adjacent heads.
        merge: What the heads of a group become: [group, ...] -> [...].
        dtype: Dtype to round the outcome to, that of the checkpoint.
    """
    for attention in attentions(model):
        kv_heads = attention.config.num_key_value_heads
        for heads in _kv_fields(attention, kv_heads):
            members = kv_heads // groups
            for first in range(0, kv_heads, members):
                group = heads[first : first + members]
                merged = merge(torch.stack(group).double()).to(dtype)
                for head in group:
                    head.copy_(merged)


def _kv_fields(attention: Any, kv_heads: int) -> Iterator[list[Tensor]]:
    """Every parameter that has KV heads, as views on the heads."""
    width = kv_heads * attention.head_dim
    if hasattr(attention, "qkv_proj"):
        maps = list(attention.qkv_proj.weight[-2 * width :].chunk(2))
    else:
        linears = (attention.k_proj, attention.v_proj)
        maps = [linear.weight for linear in linears]
        maps += [linear.bias for linear in linears if linear.bias is not None]
    if hasattr(attention, "k_norm") and attention.k_norm.weight.numel() == width:
        maps.append(attention.k_norm.weight)  # else one norm serves all heads
    for parameter in maps:
        yield list(parameter.chunk(kv_heads))
    if hasattr(getattr(attention, "k_layernorm", None), "norms"):
        yield [norm.weight for norm in attention.k_layernorm.norms]
