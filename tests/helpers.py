"""Comparison and model helpers that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["assert_close", "assert_equal", "load_folder", "rewrite_tensors"]


def assert_close(actual: Tensor, expected: Tensor, *, atol: float) -> None:
    """Fail unless shape and dtype agree, all is finite and no entry differs by more than atol."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert torch.isfinite(actual).all(), "actual is not finite"
    assert torch.isfinite(expected).all(), "expected is not finite"
    error = (actual - expected).abs()
    worst = int(error.argmax())
    assert float(error.max()) <= atol, (
        f"largest difference {float(error.max()):.3e} > {atol:.1e} at flat index {worst}: "
        f"{float(actual.flatten()[worst])!r} and {float(expected.flatten()[worst])!r}"
    )


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Fail unless both tensors have the same bits."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert_close(actual, expected, atol=0.0)


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The stock model of a folder; fails on any missing, unexpected or mismatched key."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    assert not any(report.values()), report
    return model.eval()


def rewrite_tensors(folder: Path, changed: dict[str, Tensor]) -> None:
    """Replace tensors of a single-file checkpoint in place."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | changed, file, metadata={"format": "pt"})
