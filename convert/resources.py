"""How much memory, disk and cores there are, and a refusal where it is not enough."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

from kvpatch.errors import ResourceError, UsageError
from kvpatch.memory import format_bytes

__all__ = ["available_cores", "available_ram", "check_disk", "check_platform", "check_ram"]

_CGROUP = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
_MARGIN = 1.05


def check_platform() -> None:
    """Refuse a system without the calls with which checkpoints are read and published.

    Raises:
        UsageError: On Windows itself; Linux and macOS have them.
    """
    if not hasattr(os, "preadv"):
        raise UsageError(
            "only Linux and macOS are supported: this system has no preadv",
            hint="On Windows, run it in WSL.",
        )


def available_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_ram() -> int:
    """Bytes of memory that this process may still take: the machine's, or its container's."""
    free: int = psutil.virtual_memory().available
    for limit_file, usage_file in _CGROUP:
        if limit_file.is_file() and usage_file.is_file():
            limit = limit_file.read_text().strip()
            if limit.isdigit():
                used = int(usage_file.read_text()) - _reclaimable(usage_file.parent)
                free = min(free, int(limit) - used)
    return max(0, free)


def _reclaimable(cgroup: Path) -> int:
    """Bytes of file cache that a container counts as used, but gives up when asked."""
    statistics = cgroup / "memory.stat"
    if not statistics.is_file():
        return 0
    rows = dict(line.split() for line in statistics.read_text().splitlines())
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))


def check_ram(
    needed: int,
    limit: int | None,
    *,
    what: str = "the conversion",
    hint: str = "End other programs, or run it on a machine with more memory.",
) -> None:
    """Refuse work that needs more memory than allowed or available.

    Args:
        needed: Predicted peak in bytes.
        limit: What the user allows; None for no limit but the machine's.
        what: What needs it.
        hint: What to do where the machine has too little.

    Raises:
        ResourceError: With both numbers.
    """
    if limit is not None and needed > limit:
        raise ResourceError(
            f"{what} needs {format_bytes(needed)} of memory, --max-ram allows "
            f"{format_bytes(limit)}",
            hint=f"Its largest layer sets this; --max-ram {-(-needed // 10**6)}MB is enough.",
        )
    free = available_ram()
    if needed > free:
        raise ResourceError(
            f"{what} needs {format_bytes(needed)} of memory, {format_bytes(free)} are free",
            hint=hint,
        )


def check_disk(needed: int, folder: Path) -> None:
    """Refuse a run whose result does not fit on the disk, with five percent to spare.

    Raises:
        ResourceError: With need, free space and the folder.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed * _MARGIN > free:
        raise ResourceError(
            f"the result needs {format_bytes(needed * _MARGIN)} on disk, "
            f"{format_bytes(free)} are free at {existing}",
            hint="Free some space, or choose an output on another disk.",
        )
