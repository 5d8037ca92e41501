"""What every row of the block tables compiled to, kept in ``golden_aot.json``.

    python -m tests.kernels.golden      (or make kernels)

compiles all rows for all architectures, which takes minutes, and writes the file. The tests compile
a sample, compare it with the file, and demand that the file is of the kernels as they are.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton

import kvpatch.kernels
from kvpatch.kernels.configs import ARCHITECTURES

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("golden_aot.json")


def compiled(arch: int, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Rows of an architecture by name, compiled in a process of their own.

    Args:
        arch: 10 times the compute capability.
        part: Which part of the rows.
        parts: In how many parts the rows are taken.

    Returns:
        As ``aot.Compiler.outcome`` for each row.

    Raises:
        AssertionError: The process failed, with what it wrote.
    """
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        "TRITON_DEFAULT_FP_FUSION": "1",  # the default of Triton 3.6 to 3.9, said aloud
    }
    command = [
        sys.executable,
        "-m",
        "tests.kernels.aot",
        f"{arch}",
        "--part",
        f"{part}",
        f"{parts}",
    ]
    process = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert not process.returncode, f"{' '.join(command)} failed:\n{process.stderr[-4000:]}"
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def sources() -> str:
    """Digest of the code of the kernels and of their tables; comments do not count."""
    digest = hashlib.sha256()
    for path in _files():
        text = path.read_text()
        tree: Any = json.loads(text) if path.suffix == ".json" else _code(text)
        digest.update(f"{path.name}\n{tree}\n".encode())
    return digest.hexdigest()


def load() -> dict[str, Any]:
    """The file: ``triton`` (its version), ``sources`` and ``rows`` by name."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def _files() -> Iterator[Path]:
    folder = Path(kvpatch.kernels.__file__).parent
    yield from sorted(path for path in folder.glob("*.py") if path.stem != "reference")
    yield from sorted(folder.glob("configs/*.json"))


def _code(text: str) -> str:
    """Source without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if documented and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def differences(row: Mapping[str, Any], golden: Mapping[str, Any]) -> list[str]:
    """What changed in the kernels of a row, in words.

    Args:
        row: As compiled now.
        golden: As kept.
    """
    return [
        f"{kernel}: {row.get(kernel)}, not {golden.get(kernel)}"
        for kernel in sorted(row.keys() | golden.keys())
        if row.get(kernel) != golden.get(kernel)
    ]


def main() -> None:
    """Compile everything and write the file."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = {
            name: row for found in pool.map(compiled, ARCHITECTURES) for name, row in found.items()
        }
    FILE.write_text(written(rows))


def written(rows: Mapping[str, Any]) -> str:
    """The file, a line for each row, so that a difference shows what changed."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    head = f'"triton": {json.dumps(triton.__version__)},\n"sources": "{sources()}"'
    return f'{{\n{head},\n"rows": {{\n{lines}\n}}\n}}\n'


if __name__ == "__main__":
    main()
