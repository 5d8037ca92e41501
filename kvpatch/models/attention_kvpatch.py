"""One attention module for all families: separate projections, any number of KV heads, shared KV.

What differs between families comes from the row of the family and from the stock attention module
that this one takes the place of: score scale, norms, rotary function, dropout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .families_kvpatch import Family
from .scores_kvpatch import (
    alibi_slopes,
    combined_mask,
    eager_attention,
    narrowed,
    span_of,
    visible,
)
from .sharing_kvpatch import SharedKV, current_kv

__all__ = ["KVAttention", "Rotation", "attention_class", "sinusoids", "turned_pairs"]

Rotation = Callable[[Tensor], Tensor]


class KVAttention(nn.Module):
    """Attention of one layer, in the place of the stock module.

    Args:
        stock: The module to replace; its query and key norms move over.
        config: Config of the converted model.
        layer_idx: Index of the decoder layer.
        family: Row of the model's family.
    """

    made_of: ClassVar[tuple[type[KVAttention], type[nn.Module]]]  # by attention_class

    def __init__(self, stock: Any, config: Any, layer_idx: int, family: Family) -> None:
        nn.Module.__init__(self)  # not that of the stock class, of which we have only the name
        self.config = config
        self.family = family
        self.layer_idx = layer_idx
        heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.is_causal = getattr(stock, "is_causal", True)
        self.scaling = _scale(stock, family.scale, self.head_dim)
        self.clip = reduce(getattr, family.clip, config) if family.clip else None
        self.softcap = getattr(stock, family.softcap) if family.softcap else None
        self.sliding_window = getattr(
            stock, "sliding_window", getattr(config, "sliding_window", None)
        )
        self.window = _window(config, layer_idx, family.window)
        self.rotary = _stock_rotary(stock) if family.rotary == "stock" else None
        self.rotates = family.rotary is not None and bool(getattr(stock, "use_rope", True))
        self.attention_dropout = _probability(stock, family.dropout)
        self.output_dropout = _probability(stock, family.output_dropout)
        modes = config.kv_sharing_modes
        self.mode = None if modes is None else modes[layer_idx]
        self.source = layer_idx if modes is None else config.kv_source_layers[layer_idx]
        self._add_projections(stock)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled by what the class was made of."""
        return _without_state, self.made_of, self.__dict__

    def reset_buffers(self) -> None:
        """Compute what is in no checkpoint and was lost on the way from the meta device."""

    def _add_projections(self, stock: Any) -> None:
        """Make the modules that hold the weights."""
        config, family = self.config, self.family
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden = config.hidden_size
        self.num_key_value_groups = heads // kv_heads
        bias = getattr(stock, family.projection).bias is not None
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.q_norm_name = self._take(stock, family.q_norm)
        if self.mode != "reuse":
            self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
            self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
            self.k_norm_name = self._take(stock, family.k_norm)
        output_bias = getattr(stock, family.output).bias is not None
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        alibi: Tensor | None = None,
        position_bias: Tensor | None = None,
        shared_kv_states: SharedKV | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments that the stock layers give to their attention.

        Args:
            hidden_states: [B, T, E].
            residual: [B, T, E] to add, where the stock attention does that itself.
            attention_mask: As the stock model makes it.
            position_embeddings: Cosines and sines [B, T, rotary dims].
            position_ids: [B, T].
            past_key_values: The cache, or None.
            layer_past: The cache, under the name that older stacks have for it.
            alibi: Bias of the scores, B * H * K numbers; it takes the place of RoPE.
            position_bias: Bias of the scores [H, 1, K or more], that of the last key last.
            shared_kv_states: Keys and values of this forward pass.
            **kwargs: Passed on to the attention function.

        Returns:
            Output [B, T, E], and the attention weights [B, H, T, K] if the function gives them.
        """
        kv_cache = past_key_values if past_key_values is not None else layer_past
        rotate = self._rotation(position_embeddings, position_ids) if alibi is None else None
        query = self._queries(hidden_states, rotate)
        key, value = self._keys_and_values(hidden_states, rotate, kv_cache, shared_kv_states)
        if alibi is not None and not self.family.alibi_in_mask:
            position_bias = alibi.view(query.shape[0], query.shape[1], 1, -1)
        elif position_bias is not None:
            position_bias = position_bias[..., -key.shape[2] :]
        span = span_of(attention_mask)
        if span is None:
            mask = self._mask(attention_mask, query, key, kv_cache, position_bias)
        else:
            mask = span if self.window is None else narrowed(span, self.window)
            if position_bias is not None:
                kwargs["slopes"] = alibi_slopes(query.shape[1], query.device)
        output, weights = self._attend(query, key, value, mask, position_ids=position_ids, **kwargs)
        output = self.o_proj(output.flatten(2))
        output = nn.functional.dropout(output, self.output_dropout, self.training)
        return output if residual is None else residual + output, weights

    def _take(self, stock: nn.Module, name: str | None) -> str | None:
        """Move a norm over from the stock module; its name, or None if there is none."""
        if name is None or not hasattr(stock, name):
            return None
        self.add_module(name, getattr(stock, name))
        return name

    def _queries(self, hidden_states: Tensor, rotate: Rotation | None) -> Tensor:
        """Queries [B, H, T, D], turned to their positions."""
        query = self._project(self.q_proj, hidden_states, self.q_norm_name)
        return query if rotate is None else rotate(query)

    def _own_keys_and_values(
        self, hidden_states: Tensor, rotate: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """What this layer caches of the tokens at hand: [B, Hkv, T, D] and [B, Hkv, T, Dv]."""
        key = self._project(self.k_proj, hidden_states, self.k_norm_name)
        key = key if rotate is None else rotate(key)
        return key, self._project(self.v_proj, hidden_states, None)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T, H, Dv] of the attention function that the model is set to, and weights."""
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        return attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **({} if self.softcap is None else {"softcap": self.softcap}),
            **kwargs,
        )

    def _project(self, projection: nn.Linear, hidden_states: Tensor, norm: str | None) -> Tensor:
        """Heads [B, H, T, D] of a projection, clamped and normed."""
        states: Tensor = projection(hidden_states)
        if self.clip:
            states = states.clamp(-self.clip, self.clip)
        axes = self.family.norm_axes if norm else None
        if norm and axes == "tokens_width":
            states = getattr(self, norm)(states)
        states = states.view(*states.shape[:-1], -1, self.head_dim)
        if norm and axes == "tokens_heads":
            states = getattr(self, norm)(states)
        states = states.transpose(1, 2)
        if norm and axes == "heads_tokens":
            states = getattr(self, norm)(states)
        return states

    def _rotation(
        self, embeddings: tuple[Tensor, Tensor] | None, positions: Tensor | None
    ) -> Rotation | None:
        """What turns heads [B, H, T, D] to their positions, or None if this layer has no RoPE."""
        if not self.rotates:
            return None
        if self.rotary is None:
            assert positions is not None
            width = self.config.rotary_dim
            table = sinusoids(positions, width)
            return lambda states: torch.cat(
                (turned_pairs(states[..., :width], *table), states[..., width:]), -1
            )
        assert embeddings is not None
        cos, sin = embeddings
        turn, width = self.rotary, cos.shape[-1]

        def rotate(states: Tensor) -> Tensor:
            # the stock functions turn queries and keys at once: hand them no heads of the other
            turned, _ = turn(states[..., :width], states[:, :0, :, :width], cos, sin)
            return torch.cat((turned, states[..., width:]), -1)

        return rotate

    def _keys_and_values(
        self, hidden_states: Tensor, rotate: Rotation | None, kv_cache: Any, shared: SharedKV | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, K, D] of all tokens in sight, own ones or those of the source.

        The source's come from this forward pass and not from its cache, because a cache with a
        window has forgotten what its mask still shows.
        """
        if self.mode is not None:
            shared = current_kv() if shared is None else shared
            if shared is None:
                raise RuntimeError(
                    f"layer {self.layer_idx} shares keys and values with other layers, which only "
                    "the model can hand over: call the model and not its layers"
                )
            if self.mode == "reuse":
                return shared.read(self.source, hidden_states.device)
        key, value = self._own_keys_and_values(hidden_states, rotate)
        if kv_cache is not None:
            key, value = kv_cache.update(key, value, self.layer_idx)
        if shared is not None and self.mode == "store":
            shared[self.layer_idx] = (key, value)
        return key, value

    def _mask(
        self, mask: Tensor | None, query: Tensor, key: Tensor, kv_cache: Any, bias: Tensor | None
    ) -> Tensor | None:
        """The stock model's mask with the window and the score bias of this layer in it."""
        if mask is not None and self.family.masked_true:
            # it made a bool of an additive mask; other attention functions have bool masks anyway
            mask = ~mask if self.config._attn_implementation == "eager" else mask
        if bias is None and self.window is None:
            return mask
        allowed = None
        if mask is None or self.window is not None:
            tokens, keys = query.shape[2], key.shape[2]
            seen = 0 if kv_cache is None else kv_cache.get_seq_length(self.source) - tokens
            allowed = visible(tokens, keys, seen, self.window, query.device)
        return combined_mask(mask, allowed, bias, query.dtype)


@cache
def attention_class(own: type[KVAttention], stock: type[nn.Module]) -> type[KVAttention]:
    """Our attention under the stock class, so that whoever looks for attention modules finds it."""
    members = {"__module__": __name__, "made_of": (own, stock)}
    return type(f"Kvpatch{stock.__name__}", (own, stock), members)


def _without_state(own: Any, stock: Any) -> KVAttention:
    """An object for pickle to fill; a class that is made with a model is found in no module."""
    kind = attention_class(own, stock)
    made: KVAttention = kind.__new__(kind)
    return made


def sinusoids(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, width / 2] as GPT-J has them.

    Args:
        positions: [B, T].
        width: Dims that rotate; pair i by ``position * 10000 ** (-2i / width)``.
    """
    even = torch.arange(0, width, 2, device=positions.device).float()
    angles = positions[:, None, :, None].float() * (1.0 / 10000 ** (even / width))
    return angles.cos(), angles.sin()


def turned_pairs(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States [B, H, T, 2P] with every pair (2i, 2i + 1) rotated.

    Args:
        states: Heads.
        cos: Of the angle of each pair, broadcast to [B, H, T, P].
        sin: Same.
    """
    first, second = states[..., ::2], states[..., 1::2]
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


def _scale(stock: Any, scale: str | float | None, head_dim: int) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    return float(getattr(stock, scale) if isinstance(scale, str) else scale)


def _window(config: Any, layer_idx: int, key: str | None) -> int | None:
    if key is None or config.attention_layers[layer_idx] != "local":
        return None
    return int(getattr(config, key))


def _probability(stock: Any, name: str | None) -> float:
    """Dropout probability, of a number or of a Dropout module."""
    dropout = getattr(stock, name) if name else 0.0
    return float(getattr(dropout, "p", dropout) or 0.0)


def _stock_rotary(stock: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function by which a stock modeling file turns queries and keys."""
    function: Callable[..., tuple[Tensor, Tensor]] = sys.modules[
        type(stock).__module__
    ].apply_rotary_pos_emb
    return function
