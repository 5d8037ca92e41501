"""Where the kernels run: on CUDA devices, and in the interpreter of Triton on any other."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

__all__ = ["LEAST_CAPABILITY", "interpreted", "obstacle", "processors"]

LEAST_CAPABILITY = (8, 0)  # bf16 products and asynchronous copies


def interpreted() -> bool:
    """Whether kernels are interpreted on the CPU, which is for tests: it is very slow.

    Triton reads ``TRITON_INTERPRET`` when a kernel is defined, so it must be set before that.
    """
    return os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}


@cache
def obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, or None if they can.

    Args:
        device: Of the tensors.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"its device is {device.type}, and kernels need cuda"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 in the interpreter, which runs one program at a time."""
    return 1 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count
