"""Every row of the block tables fits its architecture, found out without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import triton

from kvpatch.kernels.configs import ARCHITECTURES, SHARED_MEMORY, Config
from tests.kernels import aot, golden
from tests.kernels.launches import LAUNCHES

PARTS = 12  # one is compiled in the tests, all by ``make kernels``
ROWS = {name: config for arch in ARCHITECTURES for name, _, config, _ in aot.rows(arch)}

# instructions that multiply matrices; those of an architecture's own come first
MATRIX = {
    80: ("mma.sync",),
    86: ("mma.sync",),
    90: ("wgmma", "mma.sync"),
    100: ("tcgen05.mma", "mma.sync"),
}
# rows of a tile from which on four warps can multiply it together
WARP_GROUP_ROWS = 64


@dataclass(frozen=True, slots=True)
class Spill:
    """Rows that may keep some registers in memory.

    Args:
        op: Of the table.
        archs: Architectures.
        dtype_bytes: Of their operands.
        dim: Least width of queries and keys, with a rotary part that is apart.
        most: Bytes of a thread.
        reason: Why it is no harm, or less harm than what else there is.
    """

    op: str
    archs: tuple[int, ...]
    dtype_bytes: int
    dim: int
    most: int
    reason: str


_ALL = tuple(ARCHITECTURES)
_AMPERE = (80, 86)
_FLOAT32 = "float32 is for comparison, not for speed, and smaller blocks there are none"
_FEW = "two to four registers of a thread; nothing says yet that blocks without them are faster"

SPILLS = (
    Spill("flash_forward", _ALL, 4, 192, 256, _FLOAT32),
    Spill("flash_backward_queries", _ALL, 4, 64, 48, _FLOAT32),
    Spill("flash_backward_queries", _ALL, 4, 256, 664, _FLOAT32),
    Spill("flash_backward_keys", _ALL, 4, 192, 56, _FLOAT32),
    Spill("flash_backward_keys", _ALL, 4, 256, 824, _FLOAT32),
    Spill("flash_forward", _AMPERE, 2, 64, 16, _FEW),
    Spill("flash_backward_queries", _AMPERE, 2, 256, 8, _FEW),
    Spill("decode", _AMPERE, 2, 64, 8, _FEW),
    Spill("latent_decode", _AMPERE, 2, 320, 8, _FEW),
)


def allowed(op: str, config: Config) -> int:
    """Bytes that a thread of a row may spill."""
    return max(
        (
            spill.most
            for spill in SPILLS
            if (spill.op, spill.dtype_bytes) == (op, config.dtype_bytes)
            and config.arch in spill.archs
            and spill.dim <= config.dim + config.rope_dim
        ),
        default=0,
    )


def problems(name: str, config: Config, row: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a row, in words."""
    if "error" in row:
        yield f"{name}: {row['error']}"
        return
    for kernel, found in row.items():
        who = f"{name}, {kernel}"
        if found["shared"] > SHARED_MEMORY[config.arch]:
            yield f"{who}: {found['shared']} bytes of shared memory do not fit"
        if found["stack"] > allowed(name.split(maxsplit=1)[0], config):
            yield f"{who}: {found['stack']} bytes are spilled"
    instructions = {key for found in row.values() for key in found["instructions"]}
    own, *others = MATRIX[config.arch]
    large = config.block_m >= WARP_GROUP_ROWS and config.num_warps >= 4
    promised = {own} if large else {own, *others}
    if config.dtype_bytes == 2 and not instructions & promised:
        yield f"{name}: none of {sorted(promised)} is in it"
    if config.num_stages > 1 and "cp.async" not in instructions:
        yield f"{name}: {config.num_stages} stages are asked for, and nothing is read ahead"


def test_every_table_has_a_call_that_takes_its_rows() -> None:
    assert sorted(LAUNCHES) == aot.operations()


def test_all_rows_were_compiled_from_these_sources() -> None:
    kept = golden.load()
    assert kept["sources"] == golden.sources(), "make kernels, and look at what changes"
    assert kept["rows"].keys() == ROWS.keys()


def test_all_rows_are_sound() -> None:
    rows = golden.load()["rows"]
    assert not [
        problem for name, row in rows.items() for problem in problems(name, ROWS[name], row)
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_sample_compiles_to_what_is_kept(arch: int) -> None:
    kept = golden.load()
    sample = golden.compiled(arch, 0, PARTS)
    assert sample
    assert not [fault for name, row in sample.items() for fault in problems(name, ROWS[name], row)]
    if triton.__version__ == kept["triton"]:
        changed = {
            name: golden.differences(row, kept["rows"][name]) for name, row in sample.items()
        }
        assert not {name: what for name, what in changed.items() if what}


PLANTED = {
    "a kernel that does not compile": lambda row: row | {"error": "CompilationError"},
    "too much shared memory": lambda row: _with(row, shared=300 << 10),
    "spilled registers": lambda row: _with(row, stack=8),
    "no matrix instruction": lambda row: _with(row, instructions={"cp.async": 1}),
    "nothing read ahead": lambda row: _with(row, instructions={"mma.sync": 1, "wgmma": 1}),
}


def _with(row: dict[str, Any], **changed: Any) -> dict[str, Any]:
    row = copy.deepcopy(row)
    for found in row.values():
        found.update(changed)
    return row


@pytest.mark.parametrize("fault", PLANTED)
def test_faults_are_found(fault: str) -> None:
    config = Config(
        arch=90, dtype_bytes=2, dim=128, block_m=128, block_n=64, num_warps=8, num_stages=3
    )
    found = {
        "shared": 100,
        "registers": 10,
        "stack": 0,
        "instructions": {"wgmma": 4, "cp.async": 2},
    }
    row = {"flash_forward": found}
    assert not list(problems("flash", config, row))
    assert len(list(problems("flash", config, PLANTED[fault](row)))) == 1
