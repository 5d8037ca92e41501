"""Stock transformers models as the truth: made, loaded in real float64, and changed in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.tiny import attention as attention_name
from tests.families.tiny import family

__all__ = [
    "Checkpoints",
    "Conversions",
    "Float64",
    "attentions",
    "change_kv_heads",
    "full_logits",
    "kv_fields",
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


@contextmanager
def _float64_by_default() -> Iterator[None]:
    """What the integers of a table of positions become when they are divided."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make(name: str, settings: Mapping[str, Any], *, seed: int = 0) -> Any:
    """A stock model with random weights: biases and norms too, so that each one matters."""
    config = CONFIG_MAPPING[family(name)](**settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if key.endswith("weight") and ("norm" in key or weight.dim() == 1):
                noise = 1 + 0.3 * noise
            elif key.endswith("bias"):
                noise *= 0.3
            else:
                noise *= weight.shape[-1] ** -0.5
            weight.copy_((noise / _GRID).round() * _GRID)
    return model


def load(folder: Path) -> Any:
    """The stock model of a folder in float64; fails on a missing, unexpected or mismatched key.

    Runs eagerly, because fused attention and expert kernels have no such precision. Falcon does
    not: its eager attention adds the ALiBi bias twice (transformers 5.17 to 5.23).
    """
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    with Float64(), _float64_by_default():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="sdpa" if model_type == "falcon" else "eager",
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
    with Float64(), _float64_by_default():
        logits: Tensor = model(ids, use_cache=False, **inputs).logits
    return logits


def attentions(model: Any) -> list[Any]:
    """The attention module of every layer."""
    name = attention_name(model.config.model_type)
    return [
        model.get_submodule(name.format(layer=layer))
        for layer in range(model.config.num_hidden_layers)
    ]


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
    kv_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    for attention in attentions(model):
        for heads in kv_fields(attention, kv_heads):
            members = kv_heads // groups
            for first in range(0, kv_heads, members):
                group = heads[first : first + members]
                merged = merge(torch.stack(group).double()).to(dtype)
                for head in group:
                    head.copy_(merged)


def kv_fields(attention: Any, kv_heads: int) -> Iterator[list[Tensor]]:
    """Every parameter of an attention module that has KV heads, as views on the heads."""
    if hasattr(attention, "query_key_value"):  # query, key and value, head after head
        for parameter in attention.query_key_value.parameters():
            for part in (1, 2):
                yield [head.chunk(3)[part] for head in parameter.chunk(kv_heads)]
        return
    if hasattr(attention, "c_attn"):  # a transposed weight
        for parameter in attention.c_attn.parameters():
            for part in parameter.chunk(3, dim=-1)[1:]:
                yield list(part.chunk(kv_heads, dim=-1))
        return
    if type(attention).__name__ == "CodeGenAttention":  # queries, values and keys, four times
        for part in (1, 2):
            blocks = attention.qkv_proj.weight.chunk(4)
            yield [h for block in blocks for h in block.chunk(3)[part].chunk(kv_heads // 4)]
        return
    width = kv_heads * attention.head_dim
    fused = getattr(attention, "qkv_proj", getattr(attention, "Wqkv", None))
    if fused is not None:
        maps = list(fused.weight[-2 * width :].chunk(2))
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
