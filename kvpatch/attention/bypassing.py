"""Stock classes that compute attention themselves and ask for no attention function: ours ask.

Each computes queries, keys and values as its stock class does, and hands them over.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from kvpatch.attention.interface import attention_forward
from kvpatch.attention.stock import StockClass, Swapped
from kvpatch.models.scores_kvpatch import alibi_slopes, combined_mask, narrowed, span_of, visible

__all__ = ["STOCK"]


class Inner(Swapped):
    """For classes that have a method ``_attn`` of queries, keys and values."""

    attn_dropout: nn.Dropout
    weights_asked: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward, which calls ``_attn``."""
        self.weights_asked = bool(kwargs.get("output_attentions"))
        return super().forward(*args, **kwargs)

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs and weights of queries [B, H, T, D], keys and values [B, H, K, D]."""
        output, weights = attention_forward(
            self,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            self._mask(attention_mask, query, key),
            scaling=self._scaling(),
            dropout=self.attn_dropout.p if self.training else 0.0,
            output_attentions=self.weights_asked,
        )
        return output.transpose(1, 2), weights

    def _scaling(self) -> float:
        return 1 / float(self.scale_attn)  # type: ignore[arg-type]

    def _mask(self, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        return mask


class Windowed(Inner):
    """GPT-Neo, whose scores are not scaled, and some of whose layers have a window."""

    config: Any
    bias: Tensor
    attention_type: str

    def _scaling(self) -> float:
        return 1.0

    def _mask(self, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        if self.attention_type != "local":
            return mask
        span = span_of(mask)
        if span is not None:
            return narrowed(span, self.config.window_size)
        tokens, keys = query.shape[2], key.shape[2]
        seen = self.bias[0, 0, keys - tokens : keys, :keys]
        return combined_mask(mask, seen, None, query.dtype)


class Biased(Swapped):
    """For classes with ALiBi biases, one for each head and key."""

    layer_idx: int

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None,
        bias: Tensor,
        kv_cache: Any,
        **how: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs [B, T, H * D] and weights.

        Args:
            query: [B, H, T, D].
            key: [B, H, T, D], of the tokens at hand.
            value: [B, H, T, D].
            mask: As the model makes it.
            bias: [B or 1, H, 1, K or more], that of the last key last.
            kv_cache: The cache, or None.
            **how: For the attention function.
        """
        if kv_cache is not None:
            key, value = kv_cache.update(key, value, self.layer_idx)
        tokens, keys = query.shape[2], key.shape[2]
        span = span_of(mask)
        if span is not None:
            mask, how["slopes"] = span, alibi_slopes(query.shape[1], query.device)
        else:
            before = 0 if kv_cache is None else kv_cache.get_seq_length(self.layer_idx) - tokens
            seen = visible(tokens, keys, before, None, query.device) if mask is None else None
            mask = combined_mask(mask, seen, bias[..., -keys:], query.dtype)
        output, weights = attention_forward(self, query, key, value, mask, **how)
        return output.flatten(2), weights


class Bloom(Biased):
    """BLOOM."""

    num_heads: int
    inv_norm_factor: float
    hidden_dropout: float
    attention_dropout: nn.Dropout
    query_key_value: Any
    dense: Any

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        *,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        output_attentions: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the stock class does, and add the residual."""
        query, key, value = self._reshape(self.query_key_value(hidden_states))  # type: ignore[operator]
        output, weights = self._attend(
            query,
            key,
            value,
            mask=attention_mask,
            bias=alibi.view(len(query), self.num_heads, 1, -1),
            kv_cache=layer_past,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p if self.training else 0.0,
            output_attentions=output_attentions,
        )
        output = nn.functional.dropout(self.dense(output), self.hidden_dropout, self.training)
        return residual + output, weights


class Mpt(Biased):
    """MPT."""

    n_heads: int
    head_dim: int
    softmax_scale: float
    attn_dropout_p: float
    clip_qkv: float | None
    Wqkv: Any
    out_proj: Any

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the stock class does."""
        states = self.Wqkv(hidden_states)
        if self.clip_qkv:
            states = states.clamp(-self.clip_qkv, self.clip_qkv)
        heads = states.unflatten(-1, (3, self.n_heads, self.head_dim)).transpose(1, 3)
        query, key, value = heads.unbind(2)
        output, weights = self._attend(
            query,
            key,
            value,
            mask=attention_mask,
            bias=position_bias[None],
            kv_cache=past_key_values,
            scaling=self.softmax_scale,
            dropout=self.attn_dropout_p if self.training else 0.0,
        )
        return self.out_proj(output), weights


class Falcon(Swapped):
    """Falcon with rotary positions."""

    config: Any
    layer_idx: int
    inv_norm_factor: float
    query_key_value: Any
    dense: Any

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        layer_past: Any = None,
        output_attentions: bool = False,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the stock class does."""
        heads = self._split_heads(self.query_key_value(hidden_states))  # type: ignore[operator]
        query, key, value = (states.transpose(1, 2) for states in heads)
        rotate = sys.modules[self.row.module].apply_rotary_pos_emb
        query, key = rotate(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        output, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            output_attentions=output_attentions,
        )
        return self.dense(output.flatten(2)), weights


STOCK: tuple[StockClass, ...] = (
    StockClass(model_type="bloom", name="BloomAttention", own=Bloom),
    StockClass(model_type="falcon", name="FalconAttention", own=Falcon),
    StockClass(model_type="mpt", name="MptAttention", own=Mpt),
    StockClass(model_type="gptj", name="GPTJAttention", own=Inner),
    StockClass(model_type="gpt_neo", name="GPTNeoSelfAttention", own=Windowed),
    StockClass(model_type="codegen", name="CodeGenAttention", own=Inner),
)
