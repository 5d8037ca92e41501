"""Kernels in the interpreter of Triton, where there is no CUDA device.

Triton decides when a function is defined whether it is interpreted, for its own functions too. So
Triton is imported under ``interpreting`` before anything else imports it, and so are our kernels;
other tests of the same process run without the variable and never see interpreted kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch

import kvpatch.kernels
from kvpatch.kernels import device

INSTALLED = importlib.util.find_spec("triton") is not None
COMPILED = torch.cuda.is_available()


@contextmanager
def interpreting() -> Iterator[None]:
    """Have kernels interpreted that are defined or run in a ``with`` block, if none is compiled.

    Infinities and NaN pass without a warning there, as they do on a GPU.
    """
    if COMPILED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setenv("TRITON_INTERPRET", "1")
        device.obstacle.cache_clear()
        try:
            yield
        finally:
            device.obstacle.cache_clear()


def import_triton() -> None:
    """Import Triton so that its own functions can be interpreted, and correct the interpreter."""
    if not INSTALLED:
        return
    with interpreting():
        importlib.import_module("triton")
    if not COMPILED:
        from tests.kernels import corrections

        corrections.install()


def import_kernels() -> list[ModuleType]:
    """Import every file of kernels, so that no other test is the first to do so."""
    package = kvpatch.kernels
    found = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(module.name) for module in found]
