"""Fused attention in the models that a run computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvpatch.attention.survey import attentions, report_on
from kvpatch.patching import patch

__all__ = ["Decision", "computed_by", "fuse", "on_gpu"]

# whether kernels are to compute the attention of models on a device
Decision = Callable[[torch.device], bool]


def on_gpu(device: torch.device) -> bool:
    """The decision of every run: kernels compute on CUDA devices; elsewhere nothing changes."""
    return device.type == "cuda"


def fuse(model: Any) -> None:
    """Let kernels compute what they can of a model; one of which they know nothing stays as it is.

    Args:
        model: Of transformers, perhaps with adapters; no module of it may be wrapped yet.
    """
    if any(attention.refusal is None for attention in attentions(model)):
        patch(model)


def computed_by(model: Any) -> list[str]:
    """What computes a model's attention where it lies now, in lines for people.

    Args:
        model: One that ``fuse`` was given; under the autocast that it runs in.
    """
    return str(report_on(attentions(model))).splitlines()
