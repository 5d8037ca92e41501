"""Fused attention and its gradients against the reference in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvpatch.kernels import flash, flash_launch
from kvpatch.kernels.configs import Config, find
from kvpatch.kernels.launch import Operands
from tests.kernels.flash_cases import CASES, Case, Problem, problem
from tests.kernels.measures import assert_close, laid_out_as, with_poison

# on the way back scores are rounded too, and what is summed is small beside its terms
BACKWARD = 2.0


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small operands fall in several tiles of both kinds."""

    def config_for(op: str, device: torch.device, dtype: torch.dtype, **sizes: int) -> Config:
        rows = {"flash_forward": (32, 16), "flash_backward_queries": (16, 32)}
        block_m, block_n = rows.get(op, (16, 32))
        config = find(op, 80, dtype, **sizes)
        assert config is not None
        return dataclasses.replace(config, block_m=block_m, block_n=block_n, num_warps=4)

    monkeypatch.setattr(flash_launch, "config_for", config_for)


def _solve(given: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the op."""
    operands = {name: t.detach().requires_grad_() for name, t in given.operands.items()}
    output = flash.attention(**operands, **given.options)
    grads = torch.autograd.grad(output, list(operands.values()), given.grad)
    return output.detach(), dict(zip(operands, grads, strict=True))


def _check(given: Problem) -> None:
    output, grads = _solve(given)
    expected, _, expected_grads = given.reference()
    assert_close(output, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == given.operands[name].dtype
        assert_close(grad, expected_grads[name], factor=BACKWARD)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str, device: str) -> None:
    _check(problem(CASES[name], torch.float32, device))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gqa", "all_at_once"])
def test_half_precision(name: str, dtype: torch.dtype, device: str) -> None:
    _check(problem(CASES[name], dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_of_the_tables(dtype: torch.dtype, device: str) -> None:
    case = Case(heads=2, kv_heads=1, queries=90, keys=150, dim=64, value_dim=64, rope_dim=16)
    _check(problem(case, dtype, device))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["left_padded", "all_at_once"])
def test_log_sums(name: str, device: str) -> None:
    """Outputs do not tell a bias that is the same for all keys, but these do."""
    given = problem(CASES[name], torch.float32, device)
    inputs = dict.fromkeys(("query_rope", "key_rope")) | given.operands | given.options
    _, total = torch.ops.kvpatch.flash_forward(**inputs)
    _, expected, _ = given.reference()
    seen = expected > -torch.inf
    assert (total[~seen] == -torch.inf).all()
    torch.testing.assert_close(total[seen].double(), expected[seen], rtol=0, atol=4e-6)


@pytest.mark.usefixtures("small_blocks")
def test_empty_spans_have_zeros_and_pass_no_gradient(device: str) -> None:
    given = problem(CASES["left_padded"], torch.float32, device)
    output, grads = _solve(given)
    span = given.options["span"]
    empty = span[..., 0] >= span[..., 1]
    assert empty.any()
    assert not output[empty].any()
    assert not grads["query"].transpose(1, 2)[empty].any()


def _of_projections(tensor: Tensor) -> Tensor:
    """As a projection leaves it, tokens before heads; between memory that must not be read."""
    return laid_out_as(with_poison(tensor, dim=1, before=1, after=2), 0, 2, 1, 3)


def _of_static_cache(tensor: Tensor) -> Tensor:
    """A slice of longer memory, the rest of which must not be read."""
    return with_poison(with_poison(tensor, dim=2, before=0, after=40), dim=0, before=1)


def _of_split(tensor: Tensor) -> Tensor:
    """A part of wider heads, the rest of which must not be read."""
    return with_poison(tensor, dim=3, before=8, after=8)


def _transposed(tensor: Tensor) -> Tensor:
    """The last axis is not contiguous."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _expanded(tensor: Tensor) -> Tensor:
    """The same numbers for all of a batch, once in memory."""
    return tensor[:1].expand(*tensor.shape)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "change",
    [_of_projections, _of_static_cache, _of_split, _transposed, _expanded],
    ids=lambda change: change.__name__,
)
def test_strides(change, device: str) -> None:
    case = Case(
        batch=2, heads=2, kv_heads=1, queries=20, keys=37, dim=24, value_dim=20, rope_dim=12
    )
    _check(problem(case, torch.float32, device).renewed(change))


def test_keys_that_32_bits_do_not_reach(tmp_path: Path, device: str) -> None:
    case = Case(heads=1, queries=20, keys=300, dim=16, value_dim=16)
    given = problem(case, torch.float16, device)
    apart = 1 << 23
    size = case.keys * apart  # of which little is touched
    memory = (
        torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
        if device == "cpu"
        else torch.empty(size, dtype=torch.float16, device=device)
    )
    far = memory.as_strided((1, 1, case.keys, case.dim), (size, size, apart, 1))
    far.copy_(given.operands["key"])
    given.operands["key"] = far
    _check(given)


@pytest.mark.usefixtures("small_blocks")
def test_spans_of_any_strides(device: str) -> None:
    given = problem(CASES["left_padded"], torch.float32, device)
    span = given.options["span"]
    expected = flash.attention(**given.operands, **given.options)
    for other in (_transposed(span), span.repeat_interleave(2, 1)[:, ::2]):
        assert other.stride() != span.stride()
        options = given.options | {"span": other}
        assert torch.equal(flash.attention(**given.operands, **options), expected)


@pytest.mark.usefixtures("small_blocks")
def test_keys_behind_the_last_span_are_not_read(device: str) -> None:
    given = problem(CASES["gqa"], torch.float32, device)
    given.options["span"] = given.options["span"].clamp(max=29)
    expected, expected_grads = _solve(given)
    for name in ("key", "value"):
        given.operands[name][:, :, 29:] = torch.nan
    output, grads = _solve(given)
    assert torch.equal(output, expected)
    assert torch.equal(grads["query"], expected_grads["query"])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("processors", [2, 4, 64])
def test_a_group_in_parts(processors: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(flash_launch, "processors", lambda device: processors)
    case = Case(heads=10, kv_heads=2, queries=21, keys=40, rope_dim=16, value_dim=16)
    given = problem(case, torch.float16, device)
    operands = Operands(
        **dict.fromkeys(("query_rope", "key_rope")) | given.operands, **given.options
    )
    parts = {2: 1, 4: 2, 64: 5}[processors]  # of 4 programs, and groups of 5 heads
    assert flash_launch.parts_of_group(operands) == parts
    _check(given)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("cached", [1, 30_000, 1 << 30])
def test_order_of_programs(cached: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(flash_launch, "_CACHED_BYTES", cached)
    case = Case(batch=2, heads=4, kv_heads=2, queries=21, keys=37)
    _check(problem(case, torch.float32, device))


@pytest.mark.usefixtures("small_blocks")
def test_gradients_are_the_same_to_the_bit(device: str) -> None:
    given = problem(CASES["all_at_once"], torch.float16, device)
    _, first = _solve(given)
    _, second = _solve(given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 5), (1, 5, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, int, int], device: str) -> None:
    batch, queries, keys = shape
    query = torch.ones(batch, 2, queries, 16, device=device, requires_grad=True)
    key = torch.ones(batch, 1, keys, 16, device=device, requires_grad=True)
    span = torch.tensor([0, keys], dtype=torch.int32, device=device).expand(batch, queries, 2)
    output = flash.attention(query, key, key, span, scale=1.0)
    assert output.shape == (batch, queries, 2, 16)
    output.sum().backward()
    assert not output.any()
    assert not query.grad.any()
    assert not key.grad.any()
