"""The ops in float64 in the place of the kernels: everything around a kernel runs, and fast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpatch.attention import fused
from kvpatch.kernels import reference

__all__ = ["use_reference_ops"]

_FEW = 4  # tokens of tiny models that go to the op for decoding


def use_reference_ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have all attention computed by ``kvpatch.kernels.reference``.

    Spans are checked for what the kernels rely on.

    Returns:
        A list that gets the name of the op of every call, in order.
    """
    calls: list[str] = []

    def choose(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        query_rope: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> tuple[str, str | None]:
        if query_rope is not None and value is key:
            return "latent_decode", None if slopes is None else "slopes"
        few = query.shape[2] <= _FEW and query_rope is None and not query.requires_grad
        return "decode" if few else "flash", None

    def attend(
        op: str, query: Tensor, key: Tensor, value: Tensor, span: Tensor, **how: Any
    ) -> Tensor:
        calls.append(op)
        assert span.dtype == torch.int32
        assert span.shape == (len(query), query.shape[2], 2)
        if not torch.compiler.is_compiling():
            assert (span.diff(dim=1) >= 0).all(), "an end decreases"
            assert (span[..., 0] <= span[..., 1]).all(), "a span is less than empty"
            assert 0 <= span.min() <= span.max() <= key.shape[2], "a span is beyond the keys"
        with torch.autocast(query.device.type, enabled=False):  # nor does it reach into kernels
            if op == "latent_decode":
                assert how.pop("slopes") is None
                rope, key_rope = how.pop("query_rope"), how.pop("key_rope")
                output, _ = reference.latent_attention(query, rope, key, key_rope, span, **how)
            else:
                assert how.pop("key_scale") is None
                output, _ = reference.attention(query, key, value, span, **how)
        return output.to(query.dtype)

    monkeypatch.setattr(fused, "obstacle", lambda device: None)
    monkeypatch.setattr(fused, "choose", choose)
    monkeypatch.setattr(fused, "attend", attend)
    return calls
