"""Latent attention (MLA, arXiv:2405.04434 section 2.1) in the place of the attention of any family.

What is cached of a token is one latent and one rotary key for all heads, and the scales of its keys
where they have a norm. Everything else is that of the family: the norm of queries, score scale,
softcap, windows, ALiBi, dropout, and the rotary table of the stock model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .absorbed_kvpatch import absorbed_attention, beyond_weight, prefers_absorbed
from .attention_kvpatch import KVAttention, Rotation, sinusoids, turned_pairs
from .norms_kvpatch import HeadLinear, key_scales, norm_epsilon
from .scores_kvpatch import FUSED

__all__ = ["LatentAttention", "check_table"]

# families whose rotary table has the angle of plane p in columns 2p and 2p + 1, and not from 0 on
_DOUBLED = frozenset({"cohere"})


class LatentAttention(KVAttention):
    """Attention of one layer whose keys and values are linear in one cached latent.

    There are two forms with the same weights. The expanded one makes keys and values of all heads
    and hands them to the attention function of the model; it serves training and prefill. The
    absorbed one attends to the latents themselves, where that is less work.

    The modules are ``q_proj`` [H * (Dn + Dr), E], the NoPE dims of a head first;
    ``kv_a_proj_with_mqa`` [R + Dr, E], the latent first, absent in a layer that reads another's;
    ``kv_b_proj`` [H * (Dn + Dv), R] without bias; ``o_proj`` [E, H * Dv]. Rotary dims are pairs
    (2i, 2i + 1).

    Where the stock attention norms its queries and keys, ``q_proj`` [H * D, E] and the query norm
    are those of the stock attention, Dn is D, ``q_rope`` [H, Dr, D] makes the rotary dims of a
    normed query, and ``k_proj`` [Hkv * D, E] makes keys only to be measured: the factor of their
    norm, one number for each KV head or for all, is cached behind the rotary key.
    """

    columns: Tensor

    def reset_buffers(self) -> None:
        """Compute the columns of the rotary table."""
        self.columns.copy_(torch.tensor(self._columns(), dtype=torch.long))

    def _columns(self) -> list[int]:
        step = 2 if self.family.model_type in _DOUBLED else 1
        return [step * plane for plane in self.config.kv_rope_planes[self.layer_idx]]

    def _add_projections(self, stock: Any) -> None:
        """Make the modules that hold the weights.

        Raises:
            ValueError: If the stock attention norms its keys by more than a factor, or has queries
                of other dims than the config says.
        """
        config = self.config
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.num_key_value_groups = 1  # expanded, every query head has keys and values of its own
        self.rank = config.kv_lora_rank[self.layer_idx]
        self.nope_dim, self.value_dim = config.qk_nope_head_dim, config.v_head_dim
        self.rope_dim = 2 * len(config.kv_rope_planes[self.layer_idx])
        self.rotates = self.rope_dim > 0
        self.register_buffer("columns", torch.tensor(self._columns()).long(), persistent=False)
        self.scales = self._take_norms(stock)
        own_rope = 0 if self.scales else self.rope_dim
        self.q_proj = nn.Linear(hidden, heads * (self.nope_dim + own_rope))
        if self.scales and self.rope_dim:
            self.q_rope = HeadLinear(heads, self.nope_dim, self.rope_dim)
        if self.mode != "reuse":
            self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope_dim)
            if self.scales:
                self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim)
        self.kv_b_proj = nn.Linear(self.rank, heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.value_dim, hidden)

    def _take_norms(self, stock: Any) -> int:
        """Move the query norm over; how many scales a key has, 0 if there is no norm."""
        config, family = self.config, self.family
        self.q_norm_name = self._take(stock, family.q_norm)
        if self.q_norm_name is None:
            return 0
        if family.key_scale is None:
            raise ValueError(
                f"{family.model_type}: this model norms its keys and adds a bias, which would turn "
                "with the positions of a latent's keys: leave kv_lora_rank out of config.json"
            )
        if self.nope_dim != self.head_dim:
            raise ValueError(
                f"qk_nope_head_dim is {self.nope_dim}, but this model norms queries of "
                f"{self.head_dim} dims: give {self.head_dim}"
            )
        self.norm_epsilon = norm_epsilon(getattr(stock, str(family.k_norm)))
        return 1 if family.norm_axes == "tokens_width" else int(config.num_key_value_heads)

    def _rotation(
        self, embeddings: tuple[Tensor, Tensor] | None, positions: Tensor | None
    ) -> Rotation | None:
        """What turns rotary dims [B, H, T, Dr] to their positions, or None if there are none."""
        if not self.rotates:
            return None
        if self.rotary is None:
            assert positions is not None
            cos, sin = sinusoids(positions, self.config.rotary_dim)
        else:
            assert embeddings is not None
            cos, sin = (table[:, None] for table in embeddings)
        cos, sin = cos[..., self.columns], sin[..., self.columns]
        return lambda states: turned_pairs(states, cos, sin)

    def _queries(self, hidden_states: Tensor, rotate: Rotation | None) -> Tensor:
        """Queries [B, H, T, Dn + Dr], the last Dr dims turned to their positions."""
        if self.scales:
            query = self._project(self.q_proj, hidden_states, self.q_norm_name)
            query = torch.cat((query, self.q_rope(query)), -1) if self.rope_dim else query
        else:
            width = self.nope_dim + self.rope_dim
            query = self.q_proj(hidden_states).unflatten(-1, (-1, width)).transpose(1, 2)
        return query if rotate is None else _turned(query, self.nope_dim, rotate)

    def _own_keys_and_values(
        self, hidden_states: Tensor, rotate: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """What this layer caches of the tokens at hand: [B, 1, T, R] and [B, 1, T, Dr + scales]."""
        states = self.kv_a_proj_with_mqa(hidden_states)[:, None]
        latent, key_rope = states.split([self.rank, self.rope_dim], -1)
        key_rope = key_rope if rotate is None else rotate(key_rope)
        if not self.scales:
            return latent, key_rope
        scale = key_scales(
            self.k_proj(hidden_states),
            self.scales,
            epsilon=self.norm_epsilon,
            centred=self.family.key_scale == "deviation",
        )
        return latent, torch.cat((key_rope, scale[:, None]), -1)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T, H, Dv], and weights if the form has them.

        Args:
            query: [B, H, T, Dn + Dr].
            key: Latents [B, 1, K, R].
            value: Rotary keys and scales [B, 1, K, Dr + scales].
            mask: As the attention function wants it.
            **kwargs: For the attention function.
        """
        value, scale = value[..., : self.rope_dim], value[..., self.rope_dim :]
        if self._absorbs(query.shape[2], key.shape[2], mask):
            return self._absorbed(query, key, value, scale, mask, **kwargs)
        up = self.kv_b_proj(key.squeeze(1)).unflatten(-1, (-1, self.nope_dim + self.value_dim))
        nope, values = up.transpose(1, 2).split([self.nope_dim, self.value_dim], -1)
        if self.scales <= 1 and self.config._attn_implementation == FUSED:
            # it takes the rotary key of all heads as it is
            nope, value = (nope * scale, value * scale) if self.scales else (nope, value)
            rotary = {"query_rope": query[..., self.nope_dim :], "key_rope": value}
            return super()._attend(
                query[..., : self.nope_dim], nope, values, mask, **rotary, **kwargs
            )
        keys = torch.cat((nope, value.expand(-1, nope.shape[1], -1, -1)), -1)
        if self.scales:
            keys = keys * scale.transpose(1, 3).repeat_interleave(keys.shape[1] // self.scales, 1)
        return super()._attend(query, keys, values, mask, **kwargs)

    def _absorbs(self, queries: int, keys: int, mask: Tensor | None) -> bool:
        # without a mask it is the attention function that hides what comes after a query
        return (
            not self.training
            and (queries == 1 or mask is not None)
            and self.config._attn_implementation in {"eager", "sdpa", FUSED}
            and beyond_weight(self.kv_b_proj) is None
            and prefers_absorbed(
                queries,
                keys,
                rank=self.rank,
                rope=self.rope_dim,
                nope=self.nope_dim,
                value=self.value_dim,
            )
        )

    def _absorbed(
        self,
        query: Tensor,
        latent: Tensor,
        key_rope: Tensor,
        scale: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, query_rope = query[..., : self.nope_dim], query[..., self.nope_dim :]
        up = self.kv_b_proj.weight.view(-1, self.nope_dim + self.value_dim, self.rank)
        query = torch.einsum("bhtd,hdr->bhtr", query, up[:, : self.nope_dim])
        key_scale = scale.squeeze(1).transpose(1, 2) if self.scales else None
        weights: Tensor | None
        if self.config._attn_implementation == FUSED:
            apart = {"query_rope": query_rope, "key_rope": key_rope, "key_scale": key_scale}
            output, weights = super()._attend(query, latent, latent, mask, **apart, **kwargs)
        else:
            output, weights = absorbed_attention(
                query,
                query_rope,
                latent,
                key_rope,
                mask,
                scaling=self.scaling,
                softcap=self.softcap,
                key_scale=key_scale,
            )
            output = output.transpose(1, 2)
        return torch.einsum("bthr,hdr->bthd", output, up[:, self.nope_dim :]), weights


def check_table(config: Any, table: nn.Module | None) -> None:
    """Check that the rotary table of a model has the planes that its latent layers want.

    Args:
        config: Config of the converted model.
        table: Rotary module of the stock model, if it has one.

    Raises:
        ValueError: Naming the layer and the plane.
    """
    # layers of different kinds may have tables of their own
    buffers = {} if table is None else dict(table.named_buffers())
    widths = [len(buffers[name]) for name in buffers if name.endswith("inv_freq")]
    count = min(widths, default=None)
    for layer, planes in enumerate(config.kv_rope_planes):
        if count is not None and planes and max(planes) >= count:
            raise ValueError(
                f"kv_rope_planes: layer {layer} has {max(planes)}, but the rotary table of this "
                f"model has the planes 0 to {count - 1}"
            )


def _turned(states: Tensor, nope_dim: int, rotate: Rotation) -> Tensor:
    return torch.cat((states[..., :nope_dim], rotate(states[..., nope_dim:])), -1)
