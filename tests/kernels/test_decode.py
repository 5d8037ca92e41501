"""Attention of few queries to a cache, split and merged, is attention as it is written out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvpatch.errors import UsageError
from kvpatch.kernels import decode, reference
from kvpatch.kernels.device import obstacle
from tests.kernels.interpreter import COMPILED
from tests.kernels.measures import assert_close, laid_out_as, with_poison


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Shapes of a call; ``starts`` has the first visible key of each sequence."""

    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    keys: int = 75
    dim: int = 64
    value_dim: int = 64
    starts: tuple[int, ...] = (0, 0)
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False


PLAIN = Case()
CASES = {
    "mha": Case(heads=3, kv_heads=3),
    "gqa": Case(heads=8, keys=200, dim=128, value_dim=128),
    "mqa": Case(heads=40, kv_heads=1, queries=3, starts=(0,)),
    "mqa of more rows than tiles have": Case(heads=64, kv_heads=1, queries=2, starts=(0,)),
    "odd widths": Case(heads=6, queries=3, dim=80, value_dim=96),
    "narrow": Case(dim=32, value_dim=16),
    "wide": Case(heads=2, kv_heads=1, keys=100, dim=256, value_dim=256),
    "left padding": Case(queries=2, keys=200, starts=(0, 150, 199)),
    "window": Case(queries=5, keys=200, window=40),
    "chunk that sees nothing before it": Case(queries=4, keys=4),
    "softcap": Case(softcap=1.5),
    "alibi": Case(heads=6, queries=3, alibi=True),
    "softcap, alibi, window and padding": Case(
        queries=3, keys=150, starts=(90, 0), window=60, softcap=2.0, alibi=True
    ),
}
IN_EACH_DTYPE = ("mha", "gqa", "odd widths", "softcap, alibi, window and padding")


def spans(case: Case, device: str) -> Tensor:
    """Spans of the last queries, those of padding empty."""
    rows = (len(case.starts), case.queries, case.keys)
    span = reference.causal_span(*rows, window=case.window, device=device).clone()
    first = torch.tensor(case.starts, dtype=torch.int32, device=device)
    span[..., 0] = torch.maximum(span[..., 0], first[:, None])
    return span


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def operands(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    batch = len(case.starts)
    shapes = (
        (batch, case.heads, case.queries, case.dim),
        (batch, case.kv_heads, case.keys, case.dim),
        (batch, case.kv_heads, case.keys, case.value_dim),
    )
    query, key, value = (random(*shape, dtype=dtype, device=device) for shape in shapes)
    return query, key, value


def check(case: Case, query: Tensor, key: Tensor, value: Tensor, span: Tensor) -> None:
    """Fail unless the op gives what the reference gives in float64."""
    settings = {"scale": case.dim**-0.5, "softcap": case.softcap}
    slopes = torch.linspace(0.01, 0.4, case.heads, device=query.device) if case.alibi else None

    output = decode.attention(query, key, value, span, slopes=slopes, **settings)

    wide = (t.double() for t in (query, key, value))
    expected, _ = reference.attention(*wide, span, slopes=slopes, **settings)
    assert output.dtype == query.dtype
    assert_close(output, expected)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, device: str) -> None:
    case = CASES[name]
    check(case, *operands(case, torch.float32, device), spans(case, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IN_EACH_DTYPE)
def test_equals_the_reference_in_halves(name: str, dtype: torch.dtype, device: str) -> None:
    case = CASES[name]
    check(case, *operands(case, dtype, device), spans(case, device))


def test_a_query_that_sees_nothing_has_output_zero(device: str) -> None:
    case = Case(queries=3, keys=100, starts=(0, 98, 100))
    query, key, value = operands(case, torch.float32, device)
    span = spans(case, device)
    assert (span[..., 0] >= span[..., 1]).any(1).tolist() == [False, True, True]

    output = decode.attention(query, key, value, span, scale=0.1)

    assert not output[1, 0].any()
    assert not output[2].any()
    check(case, query, key, value, span)


@pytest.mark.parametrize("splits", [1, 2, 20])
def test_any_number_of_splits_gives_the_same(
    splits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than tiles too: what a split without keys leaves unwritten is NaN here."""
    monkeypatch.setattr(decode, "splits_for", lambda *shapes: splits)
    case = Case(kv_heads=1, queries=2, keys=130, starts=(0, 130))
    check(case, *operands(case, torch.float32, device), spans(case, device))


def test_splits_of_very_different_weight(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "splits_for", lambda *shapes: 3)
    case = Case(keys=200)
    query, key, value = operands(case, torch.float32, device)
    key[0, :, 150:] = query[0, ::2] * 40
    key[1, :, :20] *= 50
    check(case, query, key, value, spans(case, device))


def test_reads_of_a_static_cache_what_is_in_sight(device: str) -> None:
    """Neither what lies before and behind, nor other heads and sequences; NaN would be seen."""
    case = Case(heads=6, queries=2, keys=90, starts=(30, 30))
    query, key, value = operands(case, torch.float16, device)
    span = spans(case, device)
    key, value = (with_poison(t[:, :, 30:], dim=2, before=30, after=166) for t in (key, value))
    whole = [t.as_strided((2, 2, 256, 64), t.stride(), 0) for t in (key, value)]
    assert whole[0].isnan().sum((0, 1, 3)).bool().sum() == 196

    output = decode.attention(query, *whole, span, scale=0.125)

    wide = (t.double() for t in (query, key, value))
    expected, _ = reference.attention(*wide, span - 30, scale=0.125)
    assert_close(output, expected)


def test_takes_tensors_as_they_lie(device: str) -> None:
    """Of transposed projections, of a cropped cache, and with one span for all sequences."""
    case = Case(heads=6, queries=3, keys=70, dim=80, value_dim=80)
    query, key, value = operands(case, torch.float32, device)
    query = with_poison(laid_out_as(query, 0, 2, 1, 3), dim=3, after=8)
    key = with_poison(laid_out_as(key, 0, 2, 1, 3), dim=2, before=3, after=7)
    value = with_poison(value, dim=1, before=1, after=2)
    span = spans(case, device)[:1].expand(2, -1, -1)
    check(case, query, key, value, span)
    by_columns = [laid_out_as(t, 0, 1, 3, 2) for t in (query, key, value)]
    check(case, *by_columns, laid_out_as(span, 0, 2, 1))


def test_no_queries_no_output(device: str) -> None:
    case = Case(queries=0)
    query, key, value = operands(case, torch.float32, device)
    span = torch.empty(2, 0, 2, dtype=torch.int32, device=device)
    assert decode.attention(query, key, value, span, scale=1.0).shape == (2, 0, 4, 64)


def test_is_an_op_of_torch(device: str) -> None:
    case = Case(heads=2, kv_heads=1, keys=20, dim=16, value_dim=32)
    query, key, value = operands(case, torch.float32, device)
    slopes = torch.rand(2, device=device)
    arguments = (query, key, value, spans(case, device), 0.25, 3.0, slopes)
    torch.library.opcheck(torch.ops.kvpatch.decode, arguments)


def test_is_traced_whole(device: str) -> None:
    case = Case(heads=2, kv_heads=1, keys=20, dim=16, value_dim=16)
    query, key, value = operands(case, torch.float32, device)
    span = spans(case, device)

    def layer(query: Tensor) -> Tensor:
        return decode.attention(query * 2, key, value, span, scale=0.25).flatten(2) + 1

    with torch.no_grad():
        traced = torch.compile(layer, backend="aot_eager", fullgraph=True)(query)
        torch.testing.assert_close(traced, layer(query), rtol=0, atol=0)


def test_refuses_gradients(device: str) -> None:
    query, key, value = operands(PLAIN, torch.float32, device)
    key.requires_grad_()
    with pytest.raises(UsageError, match="has no gradient, and an operand requires one"):
        decode.attention(query, key, value, spans(PLAIN, device), scale=1.0)
    with torch.no_grad():
        check(PLAIN, query, key, value, spans(PLAIN, device))


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Case(heads=65, kv_heads=1, queries=2), torch.float16, "130 queries share a KV head"),
        (PLAIN, torch.float64, "its dtypes are torch.float64"),
        (Case(dim=257), torch.float16, "decode has no blocks for dim 257, value_dim 64"),
        (Case(value_dim=288), torch.float16, "no blocks for dim 64, value_dim 288"),
    ],
)
def test_says_what_it_cannot_take(case: Case, dtype: torch.dtype, reason: str, device: str) -> None:
    query, key, value = operands(case, dtype, device)
    assert reason in str(decode.unsupported(query, key, value))
    with pytest.raises(UsageError, match=reason):
        decode.attention(query, key, value, spans(case, device), scale=1.0)


def test_operands_of_one_dtype(device: str) -> None:
    query, key, value = operands(PLAIN, torch.float16, device)
    assert decode.unsupported(query, key, value) is None
    mixed = decode.unsupported(query, key.float(), value)
    assert mixed == "its dtypes are torch.float16, torch.float32"


def test_needs_a_device_where_nothing_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    operands_on_cpu = operands(PLAIN, torch.float16, "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    obstacle.cache_clear()
    with pytest.raises(UsageError, match="its device is cpu, and kernels need cuda"):
        decode.attention(*operands_on_cpu, spans(PLAIN, "cpu"), scale=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="a graph is of a CUDA device")
def test_a_graph_follows_the_end_of_a_static_cache() -> None:
    """The same graph serves each step: what is in sight is a number on the device."""
    case = Case(heads=8, keys=2048, dim=128, value_dim=128)
    query, key, value = operands(case, torch.float16, "cuda")
    span = spans(case, "cuda")
    decode.attention(query, key, value, span, scale=0.1)  # compiled before it is recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode.attention(query, key, value, span, scale=0.1)
    for end in (1, 700, 2048):
        span[..., 1] = end
        graph.replay()
        wide = (t.double() for t in (query, key, value))
        expected, _ = reference.attention(*wide, span, scale=0.1)
        assert_close(output, expected)
