"""Absorbed decoding for the stock MLA attention of transformers.

The stock classes cache latents, but expand all of them into keys and values at every step. The
class here takes their place in a module that exists: the same weights and the same cache, and where
it takes fewer multiplications, attention to the latents themselves.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kvpatch.models.absorbed_kvpatch import absorbed_attention, beyond_weight, prefers_absorbed

__all__ = ["STOCK", "AbsorbedDecoding", "StockClass", "absorbed_class", "obstacle", "stock_class"]

Rotation = Callable[..., tuple[Tensor, Tensor]]

# attention functions that the absorbed form equals; their masks are dense, or None
_EQUALLED = ("eager", "sdpa")
# arguments by which a caller changes the scores or keeps the keys elsewhere
_NOT_ABSORBED = ("position_bias", "softcap", "s_aux", "cache")


@dataclass(frozen=True, slots=True)
class StockClass:
    """A stock MLA attention class.

    Args:
        model_type: Of the models that have it.
        name: Of the class.
        rotary: The function that turns queries and keys in the file of the class.
        interleaved: The one in its place where the config has ``rope_interleave``, if it can.
    """

    model_type: str
    name: str
    rotary: str
    interleaved: str | None = None

    @property
    def module(self) -> str:
        """Name of the module that defines the class."""
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"


_ROTARY = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")

STOCK: tuple[StockClass, ...] = (
    StockClass("deepseek_v2", "DeepseekV2Attention", "apply_rotary_emb"),
    StockClass("deepseek_v3", "DeepseekV3Attention", *_ROTARY),
    StockClass("youtu", "YoutuAttention", *_ROTARY),
    StockClass("minicpm3", "MiniCPM3Attention", "apply_rotary_pos_emb"),
    StockClass("glm4_moe_lite", "Glm4MoeLiteAttention", *_ROTARY),
)
_BY_CLASS: Mapping[tuple[str, str], StockClass] = {(row.module, row.name): row for row in STOCK}
_PREFIX = "Absorbed"


class AbsorbedDecoding(nn.Module):
    """Mixin before a stock class: few queries against a cache attend to the latents.

    The stock class does the rest: training, prefill, other attention functions, and every call
    while ``kv_b_proj`` is not a plain linear layer. The up-projections are read from its weight at
    every step, so that nothing goes stale when it changes.
    """

    row: StockClass
    stock: type[nn.Module]
    config: Any
    layer_idx: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    qk_head_dim: int
    v_head_dim: int
    scaling: float
    q_proj: Any
    q_a_proj: Any
    q_a_layernorm: Any
    q_b_proj: Any
    kv_a_proj_with_mqa: Any
    kv_a_layernorm: Any
    kv_b_proj: Any
    o_proj: Any

    def forward(
        self, hidden_states: Tensor, *arguments: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the stock class does.

        Args:
            hidden_states: [B, T, E].
            *arguments: Where there are any the stock class takes over; its layers name them all.
            **named: Those of the stock class.

        Returns:
            Output [B, T, E], and the weights [B, H, T, K] of eager attention.
        """
        if arguments or not self._absorbs(hidden_states.shape[1], named):
            outcome: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, *arguments, **named
            )
            return outcome
        query_nope, query_rope = self._queries(hidden_states)
        latent, key_rope = self._latents(hidden_states)
        query_rope, key_rope = self._rotate(query_rope, key_rope, named["position_embeddings"])
        latent, key_rope = named["past_key_values"].update(latent, key_rope, self.layer_idx)

        up = self.kv_b_proj.weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))
        key_up, value_up = up.split([self.qk_nope_head_dim, self.v_head_dim], 1)
        output, weights = absorbed_attention(
            torch.einsum("bhtd,hdr->bhtr", query_nope, key_up),
            query_rope,
            latent,
            key_rope,
            named.get("attention_mask"),
            scaling=self.scaling,
        )
        output = torch.einsum("bhtr,hdr->bthd", output, value_up).flatten(2)
        # fused attention has no weights to show, so that the stock class returns none
        eager = self.config._attn_implementation == "eager"
        return self.o_proj(output), weights if eager else None

    def _absorbs(self, tokens: int, named: Mapping[str, Any]) -> bool:
        """Whether this call is for the absorbed form, given the arguments of the stock class."""
        kv_cache, mask = named.get("past_key_values"), named.get("attention_mask")
        if self.training or kv_cache is None or obstacle(self) is not None:
            return False
        if mask is None and tokens > 1:
            return False  # the attention function makes it causal, not we
        if any(named.get(name) is not None for name in _NOT_ABSORBED):
            return False
        keys, _ = kv_cache.get_mask_sizes(tokens, self.layer_idx)
        return prefers_absorbed(
            tokens,
            keys,
            rank=self.kv_lora_rank,
            rope=self.qk_rope_head_dim,
            nope=self.qk_nope_head_dim,
            value=self.v_head_dim,
        )

    def _queries(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, T, Dn] and those yet to be turned [B, H, T, Dr]."""
        if self.q_lora_rank is None:
            states = self.q_proj(hidden_states)
        else:
            states = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        states = states.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        nope, rope = states.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        return nope, rope

    def _latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, 1, T, R] and the rotary key yet to be turned [B, 1, T, Dr]."""
        states = self.kv_a_proj_with_mqa(hidden_states)
        latent, rope = states.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        return self.kv_a_layernorm(latent).unsqueeze(1), rope.unsqueeze(1)

    def _rotate(
        self, query: Tensor, key: Tensor, position_embeddings: Any
    ) -> tuple[Tensor, Tensor]:
        """Queries and the key turned to their positions by the stock function."""
        row = self.row
        interleaved = row.interleaved is not None and self.config.rope_interleave
        name = row.interleaved if interleaved else row.rotary
        rotate: Rotation = getattr(sys.modules[row.module], str(name))
        # cosines and sines, or complex numbers that are both
        whole = isinstance(position_embeddings, Tensor)
        return rotate(query, key, *((position_embeddings,) if whole else position_embeddings))


def obstacle(attention: Any) -> str | None:
    """Why a module decodes in the expanded form for now, or None if nothing stands in the way.

    Args:
        attention: A module of a stock class, patched or not.
    """
    implementation = attention.config._attn_implementation
    if implementation not in _EQUALLED:
        return f"its attention function is {implementation}, not one of {', '.join(_EQUALLED)}"
    return beyond_weight(attention.kv_b_proj)


def stock_class(kind: type[nn.Module]) -> StockClass | None:
    """The row of a class, or None: a subclass of one in ``STOCK`` may compute something else."""
    return _BY_CLASS.get((kind.__module__, kind.__qualname__))


@cache
def absorbed_class(row: StockClass) -> type[AbsorbedDecoding]:
    """The stock class of a row with absorbed decoding.

    It is a subclass, so that whoever looks for attention modules of the stock class finds it.
    """
    stock: type[nn.Module] = getattr(importlib.import_module(row.module), row.name)
    members = {"__module__": __name__, "row": row, "stock": stock}
    return type(f"{_PREFIX}{row.name}", (AbsorbedDecoding, stock), members)


def __getattr__(name: str) -> type[AbsorbedDecoding]:
    """Find the class of a pickled module, which may not be made yet in this process."""
    for row in STOCK:
        if name == f"{_PREFIX}{row.name}":
            return absorbed_class(row)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
