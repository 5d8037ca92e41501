"""Whether two checkpoints hold the same bits: ``python -m benchmarks.same_weights A B``.

Reads with the safetensors library alone, one tensor of each at a time, and prints what differs as
JSON. Both sharded and single-file checkpoints are read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open


def differing_tensors(left: Path, right: Path) -> tuple[int, list[str]]:
    """(number of tensors of both, names of those whose dtype, shape or bits differ)."""
    a, b = _files(left), _files(right)
    return len(a.keys() | b.keys()), sorted(
        name for name in a.keys() | b.keys() if not _same(name, a.get(name), b.get(name))
    )


def _files(folder: Path) -> dict[str, Path]:
    """File of every tensor."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            files |= dict.fromkeys(handle.keys(), path)
    return files


def _same(name: str, left: Path | None, right: Path | None) -> bool:
    if left is None or right is None:
        return False
    with safe_open(left, framework="pt") as a, safe_open(right, framework="pt") as b:
        x, y = a.get_tensor(name), b.get_tensor(name)
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    return torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))


if __name__ == "__main__":
    compared, differing = differing_tensors(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps({"compared": compared, "differing": differing}))
