"""The corrected interpreter computes what torch computes, and what the hardware would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpatch.kernels.device import interpreted, obstacle
from tests.kernels.interpreter import COMPILED, interpreting

BLOCK = 64

with interpreting():

    @triton.jit
    def arithmetic(x_at, y_at, out_at, OPERATION: tl.constexpr, N: tl.constexpr):  # noqa: N803
        at = tl.arange(0, N)
        x, y = tl.load(x_at + at), tl.load(y_at + at)
        if OPERATION == "add":
            out = x + y
        elif OPERATION == "subtract":
            out = x - y
        elif OPERATION == "multiply":
            out = x * y
        elif OPERATION == "divide":
            out = x / y
        elif OPERATION == "negate":
            out = -x
        elif OPERATION == "absolute":
            out = tl.abs(x)
        elif OPERATION == "maximum":
            out = tl.maximum(x, y)
        elif OPERATION == "choose":
            out = tl.where(x < y, x, y)
        elif OPERATION == "fused":
            out = tl.fma(x, y, x)
        elif OPERATION == "through_half":
            out = x.to(tl.float16).to(x.dtype)
        else:
            out = tl.full((N,), 1.005, x.dtype) + tl.zeros((N,), x.dtype)
        tl.store(out_at + at, out)

    @triton.jit
    def rounding(x_at, out_at, back_at, N: tl.constexpr):  # noqa: N803
        at = tl.arange(0, N)
        out = tl.load(x_at + at).to(out_at.dtype.element_ty)
        tl.store(out_at + at, out)
        tl.store(back_at + at, out.to(tl.float32))

    @triton.jit
    def reductions(x_at, sum_at, max_at, scan_at, N: tl.constexpr):  # noqa: N803
        at = tl.arange(0, N)
        x = tl.load(x_at + at[:, None] * N + at[None, :])
        tl.store(sum_at + at, tl.sum(x, 1))
        tl.store(max_at + at, tl.max(x, 1))
        tl.store(scan_at + at[:, None] * N + at[None, :], tl.cumsum(x, 1))

    @triton.jit
    def product(x_at, y_at, out_at, PRECISION: tl.constexpr, N: tl.constexpr):  # noqa: N803
        at = tl.arange(0, N)
        square = at[:, None] * N + at[None, :]
        x, y = tl.load(x_at + square), tl.load(y_at + square)
        tl.store(out_at + square, tl.dot(x, y, input_precision=PRECISION))

    @triton.jit
    def counted(length_at, out_at):
        total = 0
        for step in range(tl.load(length_at)):
            total += step
        tl.store(out_at, total)


TORCH = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "negate": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "choose": lambda x, y: torch.where(x < y, x, y),
    "fused": lambda x, y: (x.double() * y.double() + x.double()).to(x.dtype),
    "through_half": lambda x, y: x.half().to(x.dtype),
    "constant": lambda x, y: torch.full_like(x, 1.005),
}


def _random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # signs and magnitudes of many binades: bit patterns order and add up as numbers nowhere here
    values = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])
    return values.to(dtype).to(device)


@pytest.mark.parametrize("operation", TORCH)
def test_arithmetic_is_that_of_torch(operation: str, dtype: torch.dtype, device: str) -> None:
    x = _random(BLOCK, dtype=dtype, device=device)
    y = _random(BLOCK, dtype=dtype, device=device, seed=1)
    out = torch.empty_like(x)

    arithmetic[(1,)](x, y, out, operation, BLOCK)

    assert torch.equal(out, TORCH[operation](x, y))


def test_rounds_to_nearest_and_to_even(device: str) -> None:
    """What lies between neighbours in bfloat16, halfway too, and the ends of the range."""
    bits = np.arange(0x3F80_0000, 0x3F82_0000, 2048, dtype=np.uint32)
    ends = [0.0, -0.0, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-40, -1e-45, 1.0, -1.0]
    x = torch.cat((torch.from_numpy(bits.view(np.float32).copy()), torch.tensor(ends)))
    x = torch.nn.functional.pad(x, (0, 128 - x.numel()), value=torch.nan).to(device)
    out, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)

    rounding[(1,)](x, out, back, 128)

    expected = x.to(torch.bfloat16)
    assert torch.equal(out.isnan(), x.isnan())
    seen = ~x.isnan()
    assert torch.equal(out.view(torch.int16)[seen], expected.view(torch.int16)[seen])
    assert torch.equal(back[seen], expected.float()[seen])


def test_reductions_are_those_of_torch(device: str) -> None:
    x = _random(16, 16, dtype=torch.bfloat16, device=device)
    total, largest = (torch.empty(16, dtype=x.dtype, device=device) for _ in range(2))
    running = torch.empty_like(x)

    reductions[(1,)](x, total, largest, running, 16)

    step = 2.0**-8  # rounding once, or after each addition as the hardware may
    scale = x.double().abs().sum(1)
    assert ((total.double() - x.double().sum(1)).abs() <= 4 * step * scale).all()
    assert torch.equal(largest, x.amax(1))
    far = (running.double() - x.double().cumsum(1)).abs()
    assert (far <= 4 * step * x.double().abs().cumsum(1)).all()


@pytest.mark.parametrize(
    ("precision", "bound"), [("ieee", 1e-6), ("tf32", 2e-3)], ids=["ieee", "tf32"]
)
def test_products_are_as_precise_as_the_hardware_makes_them(
    precision: str, bound: float, device: str
) -> None:
    x, y = (torch.randn(BLOCK, BLOCK, device=device) for _ in range(2))
    out = torch.empty_like(x)

    product[(1,)](x, y, out, precision, BLOCK)

    truth = x.double() @ y.double()
    error = float((out.double() - truth).norm() / truth.norm())
    assert bound / 100 < error < bound


def test_bfloat16_products_are_exact_before_they_are_added(device: str) -> None:
    x, y = (torch.randn(BLOCK, BLOCK).to(device, torch.bfloat16) for _ in range(2))
    out = torch.empty(BLOCK, BLOCK, device=device)

    product[(1,)](x, y, out, "tf32", BLOCK)

    truth = x.double() @ y.double()
    assert float((out.double() - truth).norm() / truth.norm()) < 1e-6


def test_a_number_in_memory_bounds_a_loop(device: str) -> None:
    out = torch.empty(1, dtype=torch.int32, device=device)
    counted[(1,)](torch.tensor([5], dtype=torch.int32, device=device), out)
    assert out.item() == sum(range(5))


def test_what_is_allocated_is_poisoned(dtype: torch.dtype, device: str) -> None:
    assert torch.empty(100, dtype=dtype, device=device).isnan().all()
    assert torch.ones(3, dtype=dtype, device=device).new_empty(7).isnan().all()


def test_kernels_are_interpreted_in_their_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreted() is not COMPILED
    assert COMPILED or obstacle(torch.device("cpu")) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    obstacle.cache_clear()
    assert "need cuda" in str(obstacle(torch.device("cpu")))
