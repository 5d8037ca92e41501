"""Facts that every measurement states: machine, versions, commit, date.

Imports the standard library only. A process that measures its children must stay small, since
the kernel counts the memory of a parent towards the peak of a child that it forks.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "environment", "filesystem", "hand_over", "write_result"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("kvpatch", "torch", "transformers", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date, in plain types."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _proc_value("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "load_average": list(os.getloadavg()),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
    }


def filesystem(folder: Path) -> str | None:
    """Type of the filesystem that holds a folder, such as ``ext4``."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1] if holding else None


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def hand_over(name: str, result: Mapping[str, Any], *, keep: bool) -> None:
    """Write ``results/<name>.json`` with the facts of the environment, or print the result."""
    if keep:
        path = write_result(name, {**environment(), **result})
        sys.stderr.write(f"written to {path}\n")
    else:
        json.dump(result, sys.stdout, indent=1)


def _commit() -> dict[str, Any]:
    """The commit at hand, and whether files that it tracks were changed since."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"hash": _git("rev-parse", "HEAD"), "modified": bool(changed)}


def _git(*arguments: str) -> str:
    command = ("git", *arguments)
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _proc_value(file: str, key: str) -> str | None:
    for line in Path(file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
