"""Every row of the block tables fits its architecture, found out without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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


# bytes that a thread may spill, by op and width of queries and keys, and in float32 alone, which is
# for comparison and not for speed; smaller blocks there are none
SPILLS: Mapping[str, Mapping[int, int]] = {
    "flash_forward": {192: 72, 256: 184, 320: 256},
    "flash_backward_queries": {64: 48, 128: 40, 192: 32, 256: 480, 320: 664},
    "flash_backward_keys": {192: 56, 256: 664, 320: 824},
}


def allowed(name: str, config: Config) -> int:
    """Bytes that a thread of a row may spill."""
    if config.dtype_bytes < 4:
        return 0
    return SPILLS.get(name.partition(" ")[0], {}).get(config.dim + config.rope_dim, 0)


def problems(name: str, config: Config, row: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a row, in words."""
    if "error" in row:
        yield f"{name}: {row['error']}"
        return
    for kernel, found in row.items():
        who = f"{name}, {kernel}"
        if found["shared"] > SHARED_MEMORY[config.arch]:
            yield f"{who}: {found['shared']} bytes of shared memory do not fit"
        if found["stack"] > allowed(name, config):
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


def test_no_more_may_be_spilled_than_is() -> None:
    spilled: dict[str, dict[int, int]] = {}
    for name, row in golden.load()["rows"].items():
        most = max(found["stack"] for found in row.values())
        if most:
            of_op = spilled.setdefault(name.partition(" ")[0], {})
            width = ROWS[name].dim + ROWS[name].rope_dim
            of_op[width] = max(most, of_op.get(width, 0))
    assert spilled == SPILLS


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
