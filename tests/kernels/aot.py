"""Every row of the block tables, compiled without a GPU: what it takes, and what it is made of.

The ops are called as a model calls them, and each launch stops once Triton has compiled it for the
architecture. So types, alignments and constants are those of a real launch, and a row that no call
reaches is found. It runs in a process of its own, because kernels are interpreted in the tests.

    python -m tests.kernels.aot ARCH [--part I/N]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvpatch.kernels import configs
from tests.kernels.interpreter import import_kernels
from tests.kernels.launches import FEATURES, LAUNCHES, Sizes

PROCESSORS = 132  # of an H100 and H200; it decides only whether keys are split

# instructions by their names in PTX
INSTRUCTIONS = {
    "mma.sync": re.compile(r"\bmma\.sync\."),
    "wgmma": re.compile(r"\bwgmma\.mma_async\."),
    "tcgen05.mma": re.compile(r"\btcgen05\.mma\."),
    "cp.async": re.compile(r"\bcp\.async\.c[ag]\."),
    "atomic": re.compile(r"\b(?:red|atom)\.global\."),
}
Outcome = dict[str, Any]

_USED = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


def operations() -> list[str]:
    """Names of the ops that have a table."""
    tables = resources.files("kvpatch.kernels").joinpath("configs").iterdir()
    return sorted(Path(table.name).stem for table in tables)


def name_of(op: str, config: configs.Config) -> str:
    """A row in short: ``decode 90 bf16 128+0/128 x16``."""
    kind = {2: "bf16", 4: "fp32"}[config.dtype_bytes]
    widths = f"{config.dim}+{config.rope_dim}/{config.value_dim}"
    return f"{op} {config.arch} {kind} {widths} x{config.rows}"


def rows(arch: int) -> Iterator[tuple[str, str, configs.Config, str]]:
    """Name, op, row and feature of all that is to be compiled for an architecture."""
    for op in operations():
        for config in configs.table(op):
            if config.arch == arch:
                # float32 is for comparison, and slow to compile
                for feature in FEATURES if config.dtype_bytes == 2 else ("plain",):
                    yield f"{name_of(op, config)} {feature}", op, config, feature


def part_of(name: str, parts: int) -> int:
    """To which of so many parts a row belongs, always the same."""
    return sum(name.encode()) % parts


class Compiler:
    """Stands where the GPU would: what is launched is compiled, and kept.

    Args:
        arch: 10 times the compute capability.
    """

    def __init__(self, arch: int) -> None:
        self._wanted: tuple[str, ...] = ()
        self._kernels: list[Any] = []
        self._rows: list[configs.Config | None] = []
        run, find = JITFunction.run, configs.find

        def compile_only(
            kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any
        ) -> None:
            if kernel.__name__ in self._wanted:
                compiled = run(kernel, *arguments, grid=grid, warmup=True, **named)
                if compiled not in self._kernels:
                    self._kernels.append(compiled)

        def watched_find(*arguments: Any, **named: Any) -> configs.Config | None:
            self._rows.append(find(*arguments, **named))
            return self._rows[-1]

        JITFunction.run = compile_only
        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: GPUTarget("cuda", arch, 32),
                get_current_device=lambda: 0,
                get_current_stream=lambda _: 0,
            )
        )
        _substitute(
            find=watched_find,
            architecture=lambda _: arch,
            processors=lambda _: PROCESSORS,
            obstacle=lambda _: None,
        )

    def outcome(self, op: str, config: configs.Config, feature: str) -> Outcome:
        """What came of a row: its kernels by name, or why there are none.

        Args:
            op: As for ``kernels``; ``config`` and ``feature`` too.
        """
        try:
            kernels = self.kernels(op, config, feature)
        # whatever the compiler raises is what came of the row
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        counts = Counter[str]()
        found = {}
        for kernel in kernels:
            name = kernel.metadata.name
            counts[name] += 1
            found[name if counts[name] == 1 else f"{name} {counts[name]}"] = describe(kernel)
        return found

    def kernels(self, op: str, config: configs.Config, feature: str) -> list[Any]:
        """What a call that a row is for launches.

        Args:
            op: Of the table.
            config: The row.
            feature: One of ``FEATURES``.

        Raises:
            AssertionError: If the call takes other rows than this one, so that nothing takes it.
        """
        launch = LAUNCHES[op]
        self._kernels, self._rows, self._wanted = [], [], launch.kernels
        launch.call(Sizes.of(config, feature), FEATURES[feature])
        assert config in self._rows, f"{name_of(op, config)} is never taken, but {self._rows}"
        missing = set(launch.kernels) - {kernel.metadata.name for kernel in self._kernels}
        assert not missing, f"{name_of(op, config)} launches no {missing}"
        return self._kernels


def _substitute(**functions: Any) -> None:
    """Put functions where files of kernels have others of these names."""
    for module in import_kernels():
        for name in functions.keys() & vars(module).keys():
            setattr(module, name, functions[name])


def describe(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes of a multiprocessor, and which instructions it has.

    Args:
        kernel: Of Triton, compiled for CUDA.

    Returns:
        ``shared`` and ``stack`` in bytes (a stack is where registers are spilled), ``registers`` of
        a thread, and how many of each of ``INSTRUCTIONS``.
    """
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    registers, stack, local = map(int, _USED.search(listing).groups())
    found = {
        name: len(pattern.findall(kernel.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()
    }
    return {
        "shared": kernel.metadata.shared,
        "registers": registers,
        "stack": stack + local,
        "instructions": {name: count for name, count in found.items() if count},
    }


def main() -> None:
    """Compile the rows of an architecture and print what came of them, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int, choices=configs.ARCHITECTURES)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    arguments = parser.parse_args()
    part, parts = arguments.part
    compiler = Compiler(arguments.arch)
    found = {
        name: compiler.outcome(op, config, feature)
        for name, op, config, feature in rows(arguments.arch)
        if part_of(name, parts) == part
    }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
