"""How the kernels of ``flash`` are launched: their arguments, blocks and order of programs."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kvpatch.kernels.configs import Config, config_for
from kvpatch.kernels.device import processors
from kvpatch.kernels.flash_backward import flash_backward_keys, flash_backward_queries
from kvpatch.kernels.flash_forward import flash_forward
from kvpatch.kernels.launch import Operands, strides

__all__ = ["forward", "grad_of_keys", "grad_of_queries", "parts_of_group"]

# programs for each processor below which a group of heads is worked on in parts
_WAVES = 2
# what programs that run at the same time may read: it fits the L2 cache of an A100 or later
_CACHED_BYTES = 32 << 20


def _config(operands: Operands, op: str) -> Config:
    """Row of an op's table that serves."""
    return config_for(op, operands.query.device, operands.query.dtype, **operands.sizes)


def _arguments(operands: Operands, config: Config) -> dict[str, Any]:
    """Arguments that all kernels take here, by name."""
    heads = operands.query.shape[1]
    return {**operands.arguments(config), "heads": heads, "PRECISION": precision()}


def precision() -> str:
    """How float32 is multiplied: as torch is told to, but never without tensor cores.

    In three products of TensorFloat-32 what is left of the mantissa is carried too.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


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
        **_arguments(operands, config),
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
    config = _config(operands, "flash_forward")
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
    config = _config(operands, "flash_backward_queries")
    arguments = {
        "grad": grad,
        **strides("grad", "bth", grad),
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
    config = _config(operands, "flash_backward_keys")
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
    config = _config(operands, "flash_backward_keys")
    parts, batch, keys, kv_heads, _ = grad_key.shape
    share = triton.cdiv(operands.group, parts)
    rows = share * operands.query.shape[2] * _bytes_of_row(operands.query, grad)
    shares = kv_heads * parts
    flash_backward_keys[triton.cdiv(keys, config.block_n) * batch * shares,](
        **_arguments(operands, config),
        **strides("grad", "bth", grad),
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
