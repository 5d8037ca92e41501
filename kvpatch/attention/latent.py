"""Attention to latents for the stock MLA classes of transformers.

The stock classes cache latents, but expand all of them into keys and values at every step, and copy
the rotary key for every head. The class here takes their place in a module that exists: the same
weights and the same cache. Where it takes fewer multiplications it attends to the latents
themselves, and else it leaves the rotary key apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpatch.attention.interface import attention_forward
from kvpatch.attention.stock import StockClass, Swapped
from kvpatch.models.absorbed_kvpatch import beyond_weight, prefers_absorbed
from kvpatch.models.scores_kvpatch import FUSED

__all__ = ["STOCK", "LatentClass", "LatentDecoding"]

Rotation = Callable[..., tuple[Tensor, Tensor]]

# arguments by which a caller changes the scores or keeps the keys elsewhere
_NOT_ABSORBED = ("position_bias", "softcap", "s_aux", "cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentClass(StockClass):
    """A stock MLA attention class.

    Args:
        rotary: The function that turns queries and keys in the file of the class.
        interleaved: The one in its place where the config has ``rope_interleave``, if it can.
    """

    rotary: str
    interleaved: str | None = None


class LatentDecoding(Swapped):
    """Mixin before a stock class: latents are expanded only where that is less work.

    The up-projections are read from the weight of ``kv_b_proj`` at every step, so that nothing
    goes stale when it changes; if it is more than its weight, it is called. The stock class does
    what another attention function is set for.
    """

    config: Any
    layer_idx: int
    attention_dropout: float
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
        if arguments or self.config._attn_implementation != FUSED:
            outcome: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, *arguments, **named
            )
            return outcome
        mask, kv_cache = named.pop("attention_mask", None), named.pop("past_key_values", None)
        query, query_rope = self._queries(hidden_states)
        latent, key_rope = self._latents(hidden_states)
        query_rope, key_rope = self._rotate(query_rope, key_rope, named.pop("position_embeddings"))
        if kv_cache is not None:
            latent, key_rope = kv_cache.update(latent, key_rope, self.layer_idx)
        how = {
            **named,
            "query_rope": query_rope,
            "key_rope": key_rope,
            "scaling": self.scaling,
            "dropout": self.attention_dropout if self.training else 0.0,
        }
        split = [self.qk_nope_head_dim, self.v_head_dim]
        if self._absorbs(hidden_states.shape[1], latent.shape[2], mask, named):
            up = self.kv_b_proj.weight.unflatten(0, (-1, sum(split)))
            key_up, value_up = up.split(split, 1)
            query = torch.einsum("bhtd,hdr->bhtr", query, key_up)
            output, weights = attention_forward(self, query, latent, latent, mask, **how)
            output = torch.einsum("bthr,hdr->bthd", output, value_up)
        else:
            up = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (-1, sum(split))).transpose(1, 2)
            key, value = up.split(split, -1)
            output, weights = attention_forward(self, query, key, value, mask, **how)
        return self.o_proj(output.flatten(2)), weights

    def _absorbs(
        self, tokens: int, keys: int, mask: Tensor | None, named: Mapping[str, Any]
    ) -> bool:
        """Whether this call is for the absorbed form."""
        if self.training or (mask is None and tokens > 1):
            return False
        if any(named.get(name) is not None for name in _NOT_ABSORBED):
            return False
        return beyond_weight(self.kv_b_proj) is None and prefers_absorbed(
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


def _row(model_type: str, name: str, rotary: str, interleaved: str | None = None) -> LatentClass:
    return LatentClass(
        model_type=model_type,
        name=name,
        own=LatentDecoding,
        rotary=rotary,
        interleaved=interleaved,
    )


_ROTARY = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")

STOCK: tuple[LatentClass, ...] = (
    _row("deepseek_v2", "DeepseekV2Attention", "apply_rotary_emb"),
    _row("deepseek_v3", "DeepseekV3Attention", *_ROTARY),
    _row("youtu", "YoutuAttention", *_ROTARY),
    _row("minicpm3", "MiniCPM3Attention", "apply_rotary_pos_emb"),
    _row("glm4_moe_lite", "Glm4MoeLiteAttention", *_ROTARY),
)
