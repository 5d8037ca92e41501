"""Kernels on a CUDA device where there is one, else in the interpreter of Triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.interpreter import COMPILED, INSTALLED, import_kernels, interpreting

# Triton is for Linux; what stands here needs it to be imported at all
collect_ignore_glob = [] if INSTALLED else ["*.py"]
if INSTALLED:
    with interpreting():
        import_kernels()


@pytest.fixture(autouse=True)
def _interpreting() -> Iterator[None]:
    with interpreting():
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch fill what it allocates with NaN, so that what no kernel writes is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device() -> str:
    """Where the tensors of kernels are to be."""
    return "cuda" if COMPILED else "cpu"


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each number format that kernels take."""
    kind: torch.dtype = getattr(torch, request.param)
    return kind
