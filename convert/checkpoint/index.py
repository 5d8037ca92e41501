"""The index of a sharded checkpoint: as it is written, and made anew from the shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

from convert.checkpoint.safetensors_header import read_header
from convert.checkpoint.writer import write_file
from kvpatch.errors import InputModelError

__all__ = ["INDEX", "index_json", "lacks_metadata", "numbered_shards", "write_index"]

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def index_json(weight_map: Mapping[str, str], *, parameters: int, size: int) -> bytes:
    """``model.safetensors.index.json`` as transformers writes it, sorted by name."""
    index = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def lacks_metadata(folder: Path) -> bool:
    """Whether there is an index without ``metadata``, which transformers needs and nobody reads."""
    index = folder / INDEX
    return index.is_file() and "metadata" not in json.loads(index.read_bytes())


def numbered_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Files that are called shards, in order: number and count that each name states."""
    found = {path.name: _SHARD.fullmatch(path.name) for path in sorted(folder.iterdir())}
    return {name: (int(m[1]), int(m[2])) for name, m in found.items() if m is not None}


def write_index(folder: Path) -> int:
    """Write ``model.safetensors.index.json`` for the shards of a folder, from their headers.

    Args:
        folder: With all of ``model-00001-of-0000N.safetensors``.

    Returns:
        Number of tensors.

    Raises:
        InputModelError: If shards are missing or damaged, or two hold a tensor of one name.
    """
    shards = numbered_shards(folder)
    counts = {count for _, count in shards.values()}
    if len(counts) != 1:
        raise InputModelError(
            f"{folder} has "
            + ("shards of different saves" if shards else "no model-00001-of-0000N.safetensors"),
            hint="Leave the shards of one save alone in the folder.",
        )
    (count,) = counts
    missing = sorted(set(range(1, count + 1)) - {number for number, _ in shards.values()})
    if missing:
        raise InputModelError(
            f"{folder} lacks {len(missing)} of {count} shards: "
            + ", ".join(f"model-{n:05d}-of-{count:05d}.safetensors" for n in missing[:5]),
            hint="Download them first.",
        )
    weight_map: dict[str, str] = {}
    parameters = size = 0
    for file in shards:
        for info in read_header(folder / file, file):
            if info.name in weight_map:
                raise InputModelError(
                    f"{file} and {weight_map[info.name]} both hold {info.name!r}",
                    hint="Leave the shards of one save alone in the folder.",
                )
            weight_map[info.name] = file
            parameters += prod(info.shape)
            size += info.nbytes
    write_file(folder / INDEX, index_json(weight_map, parameters=parameters, size=size))
    return len(weight_map)
