"""Block sizes of the kernels: data, one file ``configs/<op>.json`` for each op.

A file is a list of rows, each an object with the fields of ``Config`` (those with a default may be
left out). What a row promises - that it compiles, fits the shared memory and spills nothing - is
checked ahead of time, without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

import torch

from kvpatch.errors import UsageError
from kvpatch.kernels.device import interpreted

__all__ = [
    "ARCHITECTURES",
    "SHARED_MEMORY",
    "Config",
    "architecture",
    "config_for",
    "find",
    "table",
]

# shared memory that one program may take, in bytes, on the architectures that have rows of their
# own; 86 stands for all with little of it (8.6, 8.9 and 12.x)
SHARED_MEMORY: Mapping[int, int] = MappingProxyType(
    {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
)
ARCHITECTURES = tuple(SHARED_MEMORY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a kernel is launched on an architecture for operands up to a size.

    Args:
        arch: 10 times the compute capability, one of ``ARCHITECTURES``.
        dtype_bytes: Of an element of the operands, 2 or 4.
        dim: Width of queries and keys (or the rank of latents) up to which the row serves.
        value_dim: The same of values; 0 for an op that has no values of their own.
        rope_dim: The same of the rotary part that is apart, if any.
        rows: Rows of queries up to which the row serves, for ops that pack heads into rows.
        block_m: Rows of queries, or packed heads, of a tile.
        block_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Tiles of keys (or of queries, where these are looped over) that are in flight.
    """

    arch: int
    dtype_bytes: int
    dim: int
    value_dim: int = 0
    rope_dim: int = 0
    rows: int = 0
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch is {self.arch}, which is none of {ARCHITECTURES}")
        for name in self.__slots__:
            number = getattr(self, name)
            if type(number) is not int or number < 0:
                raise ValueError(f"{name} is {number!r}, where a natural number was expected")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What the row serves up to: dim, value_dim, rope_dim and rows."""
        return self.dim, self.value_dim, self.rope_dim, self.rows


@cache
def table(op: str) -> tuple[Config, ...]:
    """Rows of an op, strictly read: an unknown, missing or wrong field raises.

    Args:
        op: Name of its file in ``configs/``, such as ``flash_forward``.
    """
    text = resources.files("kvpatch.kernels").joinpath(f"configs/{op}.json").read_text("utf-8")
    return tuple(Config(**row) for row in json.loads(text))


@cache
def architecture(device: torch.device) -> int:
    """Architecture of a device whose rows serve it; that of the least GPU in the interpreter."""
    if interpreted():
        return ARCHITECTURES[0]
    properties: Any = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    # by memory first, without which a row does not run: 8.7 has that of 8.0, 12.0 that of 8.6
    _, arch = max(
        (shared, arch)
        for arch, shared in SHARED_MEMORY.items()
        if arch <= capability and shared <= properties.shared_memory_per_block_optin
    )
    return arch


@cache
def find(
    op: str,
    arch: int,
    dtype: torch.dtype,
    *,
    dim: int,
    value_dim: int = 0,
    rope_dim: int = 0,
    rows: int = 0,
) -> Config | None:
    """The row of the least sizes that serve, or None.

    Args:
        op: Name of the op.
        arch: As of ``architecture``.
        dtype: Of the operands.
        dim: Width of queries and keys, or rank.
        value_dim: Width of values.
        rope_dim: Width of the rotary part that is apart.
        rows: Packed rows of queries.
    """
    sizes = (dim, value_dim, rope_dim, rows)
    fitting = (
        row
        for row in table(op)
        if (row.arch, row.dtype_bytes) == (arch, dtype.itemsize)
        and all(has >= needed for has, needed in zip(row.sizes, sizes, strict=True))
    )
    return min(fitting, key=lambda row: row.sizes, default=None)


def config_for(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dim: int,
    value_dim: int = 0,
    rope_dim: int = 0,
    rows: int = 0,
) -> Config:
    """``find`` for a device.

    Raises:
        UsageError: No row is large enough.
    """
    arch = architecture(device)
    config = find(op, arch, dtype, dim=dim, value_dim=value_dim, rope_dim=rope_dim, rows=rows)
    if config is None:
        raise UsageError(
            f"{op} has no blocks on architecture {arch} for {dtype} of dim {dim}, "
            f"value_dim {value_dim}, rope_dim {rope_dim}, rows {rows}",
            hint="compute this layer with another attention implementation, such as sdpa",
        )
    return config
