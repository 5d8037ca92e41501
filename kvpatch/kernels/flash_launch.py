"""How the kernels of ``flash`` are launched: their arguments, blocks and order of programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kvpatch.kernels.configs import Config, config_for
from kvpatch.kernels.device import processors
from kvpatch.kernels.flash_backward import flash_backward_keys, flash_backward_queries
from kvpatch.kernels.flash_forward import flash_forward

__all__ = ["Operands", "forward", "grad_of_keys", "grad_of_queries", "parts_of_group"]

_LOG2_E = math.log2(math.e)
# programs for each processor below which a group of heads is worked on in parts
_WAVES = 2
# what programs that run at the same time may read: it fits the L2 cache of an A100 or later
_CACHED_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Operands:
    """What attention is computed of; the last axes of all tensors have stride 1.

    Args:
        query: [B, H, T, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv].
        span: int32 [B, T, 2].
        scale: Factor on the scores, greater than 0.
        softcap: Bound of the scores, or None.
        slopes: float32 [H], or None.
        query_rope: [B, H, T, Dr], or None.
        key_rope: [B, 1, K, Dr], or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    span: Tensor
    scale: float
    softcap: float | None
    slopes: Tensor | None
    query_rope: Tensor | None
    key_rope: Tensor | None

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def rope_dim(self) -> int:
        """Dr, 0 without a rotary part."""
        return 0 if self.query_rope is None else self.query_rope.shape[-1]

    def config(self, op: str) -> Config:
        """Row of an op's table that serves."""
        return config_for(
            op,
            self.query.device,
            self.query.dtype,
            dim=self.query.shape[-1],
            value_dim=self.value.shape[-1],
            rope_dim=self.rope_dim,
        )

    def arguments(self, config: Config) -> dict[str, Any]:
        """Arguments that all kernels take, by name."""
        dims = {
            "D": self.query.shape[-1],
            "V": self.value.shape[-1],
            "R": self.rope_dim,
        }
        inner, outer = self.scale * _LOG2_E, 0.0
        if self.softcap is not None:
            inner, outer = -2 * inner / self.softcap, self.softcap * _LOG2_E
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "query_rope": self.query_rope,
            "key_rope": self.key_rope,
            "span": self.span,
            "slopes": self.slopes,
            **_strides("query", "bht", self.query),
            **_strides("key", "bhn", self.key),
            **_strides("value", "bhn", self.value),
            **_strides("query_rope", "bht", self.query_rope),
            **_strides("key_rope", "b_n", self.key_rope),
            **_strides("span", "bt", self.span),
            "heads": self.query.shape[1],
            "group": self.group,
            "queries": self.query.shape[2],
            "keys": self.key.shape[2],
            "inner": inner,
            "outer": outer,
            "DIM": dims["D"],
            "VALUE_DIM": dims["V"],
            "ROPE_DIM": dims["R"],
            **{f"BLOCK_{name}": max(16, triton.next_power_of_2(n)) for name, n in dims.items()},
            "CAPPED": self.softcap is not None,
            "BIASED": self.slopes is not None,
            "PRECISION": precision(),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,  # the default of Triton changes with 3.10
        }


def precision() -> str:
    """How float32 is multiplied: as torch is told to, but never without tensor cores.

    In three products of TensorFloat-32 what is left of the mantissa is carried too.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """Arguments ``<name>_<axis>`` for each axis but "_"; 0 without a tensor."""
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": steps[at] for at, axis in enumerate(axes) if axis != "_"}


def _section(heads: int, group: int, bytes_of_group: int) -> int:
    """Heads of which what ``place`` keeps together stays in the L2 cache."""
    return min(heads, group * max(1, _CACHED_BYTES // max(1, bytes_of_group)))


def _bytes_of_row(*tensors: Tensor) -> int:
    return sum(tensor.shape[-1] * tensor.itemsize for tensor in tensors)


def _by_queries(kernel: Any, operands: Operands, config: Config, arguments: dict[str, Any]) -> None:
    """Launch a kernel of which a program works on a tile of queries of a head."""
    batch, heads, queries, _ = operands.query.shape
    keys = operands.key.shape[2] * _bytes_of_row(operands.key, operands.value)
    section = _section(batch * heads, operands.group, keys)
    kernel[triton.cdiv(queries, config.block_m) * batch * heads,](
        **operands.arguments(config),
        **arguments,
        all_heads=batch * heads,
        section=section,
    )


def forward(operands: Operands, output: Tensor, lse: Tensor) -> None:
    """Launch the forward pass.

    Args:
        operands: Of it.
        output: [B, T, H, Dv], contiguous, to be written.
        lse: float32 [B, H, T], contiguous, to be written.
    """
    config = operands.config("flash_forward")
    _by_queries(flash_forward, operands, config, {"output": output, "lse": lse})


def grad_of_queries(
    operands: Operands,
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_query: Tensor,
    grad_query_rope: Tensor | None,
) -> None:
    """Launch the gradient of queries, which comes first since it writes ``delta``.

    Args:
        operands: Of the forward pass.
        grad: Of the output, [B, T, H, Dv], the last axis of stride 1.
        output: Of the forward pass; ``lse`` likewise.
        delta: float32 [B, H, T], contiguous, to be written.
        grad_query: [B, T, H, D], contiguous, to be written.
        grad_query_rope: [B, T, H, Dr], likewise, or None.
    """
    config = operands.config("flash_backward_queries")
    arguments = {
        "grad": grad,
        **_strides("grad", "bth", grad),
        "output": output,
        "lse": lse,
        "delta": delta,
        "grad_query": grad_query,
        "grad_query_rope": grad_query_rope,
        "scale": operands.scale,
    }
    _by_queries(flash_backward_queries, operands, config, arguments)


def parts_of_group(operands: Operands) -> int:
    """In how many parts a group of heads is worked on, so that no processor is without a program.

    Args:
        operands: Of the forward pass.
    """
    config = operands.config("flash_backward_keys")
    batch, kv_heads, keys, _ = operands.key.shape
    programs = max(1, batch * kv_heads * triton.cdiv(keys, config.block_n))
    wanted = triton.cdiv(_WAVES * processors(operands.key.device), programs)
    share = triton.cdiv(operands.group, max(1, min(operands.group, wanted)))
    return int(triton.cdiv(operands.group, share))


def grad_of_keys(
    operands: Operands,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_key_rope: Tensor | None,
) -> None:
    """Launch the gradients of keys and values, in P parts of each group of heads.

    Args:
        operands: Of the forward pass.
        grad: As in ``grad_of_queries``; ``lse`` and ``delta`` likewise.
        grad_key: [P, B, K, Hkv, D], contiguous, to be written.
        grad_value: [P, B, K, Hkv, Dv], likewise.
        grad_key_rope: [P, B, K, Hkv, Dr], likewise, or None.
    """
    config = operands.config("flash_backward_keys")
    parts, batch, keys, kv_heads, _ = grad_key.shape
    share = triton.cdiv(operands.group, parts)
    rows = share * operands.query.shape[2] * _bytes_of_row(operands.query, grad)
    shares = kv_heads * parts
    flash_backward_keys[triton.cdiv(keys, config.block_n) * batch * shares,](
        **operands.arguments(config),
        **_strides("grad", "bth", grad),
        grad=grad,
        lse=lse,
        delta=delta,
        grad_key=grad_key,
        grad_value=grad_value,
        grad_key_rope=grad_key_rope,
        all_shares=batch * shares,
        shares=shares,
        share=share,
        batch=batch,
        section=_section(batch * shares, 1, rows),
        scale=operands.scale,
    )
