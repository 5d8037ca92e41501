"""Absorbed latent attention of few queries to a cache is the attention that is written out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvpatch.errors import UsageError
from kvpatch.kernels import decode, reference
from tests.kernels.measures import assert_close, laid_out_as, with_poison


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Shapes of a call; ``starts`` has the first visible key of each sequence."""

    heads: int = 4
    queries: int = 1
    keys: int = 75
    rank: int = 64
    rope: int = 16
    starts: tuple[int, ...] = (0, 0)
    softcap: float | None = None
    scale_heads: int | None = None


PLAIN = Case()
CASES = {
    "plain": PLAIN,
    "of DeepSeek": Case(heads=16, keys=130, rank=512, rope=64, starts=(0,)),
    "odd rank": Case(heads=6, queries=3, rank=96, rope=24),
    "large odd rank, nothing rotary": Case(rank=384, rope=0, starts=(0,)),
    "more rows than tiles have": Case(heads=40, queries=3, keys=40, starts=(0,)),
    "left padding": Case(queries=2, keys=200, starts=(0, 150, 199)),
    "softcap": Case(softcap=1.5),
    "key scales": Case(heads=6, queries=2, keys=150, scale_heads=3),
    "one key scale": Case(scale_heads=1),
    "a key scale of every head": Case(rope=0, softcap=2.0, scale_heads=4, starts=(20, 0)),
}
IN_EACH_DTYPE = ("plain", "odd rank", "key scales")


def operands(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Queries, their rotary parts, latents and rotary keys."""
    torch.manual_seed(0)
    batch = len(case.starts)
    shapes = (
        (batch, case.heads, case.queries, case.rank),
        (batch, case.heads, case.queries, case.rope),
        (batch, 1, case.keys, case.rank),
        (batch, 1, case.keys, case.rope),
    )
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def spans(case: Case, device: str) -> Tensor:
    """Spans of the last queries, those of padding empty."""
    rows = (len(case.starts), case.queries, case.keys)
    span = reference.causal_span(*rows, device=device).clone()
    first = torch.tensor(case.starts, dtype=torch.int32, device=device)
    span[..., 0] = torch.maximum(span[..., 0], first[:, None])
    return span


def check(case: Case, tensors: list[Tensor], span: Tensor) -> None:
    """Fail unless the op gives what the reference gives in float64."""
    settings = {"scale": (case.rank + case.rope) ** -0.5, "softcap": case.softcap}
    scales = None
    if case.scale_heads is not None:
        scales = torch.rand(span.shape[0], case.scale_heads, case.keys) + 0.5
        scales = scales.to(tensors[0].device, tensors[0].dtype)

    output = decode.latent_attention(*tensors, span, key_scale=scales, **settings)

    wide = [t.double() for t in tensors]
    expected, _ = reference.latent_attention(*wide, span, key_scale=scales, **settings)
    assert output.dtype == tensors[0].dtype
    assert_close(output, expected)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, device: str) -> None:
    case = CASES[name]
    check(case, operands(case, torch.float32, device), spans(case, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IN_EACH_DTYPE)
def test_equals_the_reference_in_halves(name: str, dtype: torch.dtype, device: str) -> None:
    case = CASES[name]
    check(case, operands(case, dtype, device), spans(case, device))


def test_splits_share_the_keys(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "splits_for", lambda *shapes: 4)
    case = Case(queries=2, keys=110, starts=(0, 60, 110), scale_heads=2)
    check(case, operands(case, torch.float32, device), spans(case, device))


def test_takes_tensors_as_they_lie(device: str) -> None:
    """Parts of fused projections, and a static cache that is NaN behind the last visible key."""
    case = Case(heads=6, queries=2, keys=70)
    query, query_rope, latent, key_rope = operands(case, torch.float32, device)
    joined = laid_out_as(torch.cat((query, query_rope), -1), 0, 2, 1, 3)
    query, query_rope = joined.split([64, 16], -1)
    latent, key_rope = (with_poison(t, dim=2, after=58) for t in (latent, key_rope))
    whole = [
        t.as_strided((2, 1, 128, t.shape[-1]), t.stride(), t.storage_offset())
        for t in (latent, key_rope)
    ]
    span = spans(case, device)

    output = decode.latent_attention(query, query_rope, *whole, span, scale=0.1)

    wide = (t.double() for t in (query, query_rope, latent, key_rope))
    expected, _ = reference.latent_attention(*wide, span, scale=0.1)
    assert_close(output, expected)
    by_columns = [laid_out_as(t, 0, 1, 3, 2) for t in (query, query_rope, latent, key_rope)]
    check(case, by_columns, span)


def test_is_an_op_of_torch(device: str) -> None:
    case = Case(keys=20, rank=16)
    scales = torch.rand(2, 2, 20, device=device)
    arguments = (*operands(case, torch.float32, device), spans(case, device), 0.25, 3.0, scales)
    torch.library.opcheck(torch.ops.kvpatch.latent_decode, arguments)


def test_refuses_gradients(device: str) -> None:
    tensors = operands(PLAIN, torch.float32, device)
    tensors[2].requires_grad_()
    with pytest.raises(UsageError, match="has no gradient, and an operand requires one"):
        decode.latent_attention(*tensors, spans(PLAIN, device), scale=1.0)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(rank=520), "latent_decode has no blocks for dim 520"),
        (Case(rope=128), "no blocks for dim 64, value_dim 0, rope_dim 128"),
    ],
)
def test_says_what_it_cannot_take(case: Case, reason: str, device: str) -> None:
    tensors = operands(case, torch.float16, device)
    assert reason in str(decode.latent_unsupported(*tensors[:3]))
    with pytest.raises(UsageError, match=reason):
        decode.latent_attention(*tensors, spans(case, device), scale=1.0)
