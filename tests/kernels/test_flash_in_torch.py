"""Fused attention as an operator of torch: compiled, cast, checkpointed, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvpatch.errors import UsageError
from kvpatch.kernels import device as devices
from kvpatch.kernels import flash
from kvpatch.kernels.reference import causal_span
from tests.kernels.flash_cases import Case, Problem, problem
from tests.kernels.measures import assert_close

PLAIN = Case(heads=2, queries=9, keys=13, dim=16, value_dim=16)
LATENT = Case(
    heads=2, queries=9, keys=13, dim=16, value_dim=16, rope_dim=16, softcap=2.0, alibi=True
)
ORDER = ("query", "key", "value", "span", "scale", "softcap", "slopes", "query_rope", "key_rope")


def _solve(given: Problem, attention: Any = flash.attention) -> tuple[Tensor, ...]:
    operands = {name: t.detach().requires_grad_() for name, t in given.operands.items()}
    output = attention(**operands, **given.options)
    return output.detach(), *torch.autograd.grad(output, list(operands.values()), given.grad)


@pytest.mark.parametrize("case", [PLAIN, LATENT], ids=["plain", "latent"])
def test_operators_keep_their_promises(case: Case, device: str) -> None:
    given = problem(case, torch.float32, device)
    operands = dict.fromkeys(("query_rope", "key_rope")) | {
        name: tensor.requires_grad_() for name, tensor in given.operands.items()
    }
    inputs = tuple((operands | given.options)[name] for name in ORDER)
    torch.library.opcheck(torch.ops.kvpatch.flash_forward.default, inputs)
    output, total = torch.ops.kvpatch.flash_forward(*inputs)
    inputs = (given.grad, output.detach(), total.detach(), *inputs)
    tests = ("test_schema", "test_faketensor")  # it has no derivative
    torch.library.opcheck(torch.ops.kvpatch.flash_backward.default, inputs, test_utils=tests)


def test_compiled_without_a_break(device: str) -> None:
    given = problem(LATENT, torch.float32, device)

    def layer(query: Tensor, **others: Any) -> Tensor:
        return flash.attention(2 * query, **others).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(_solve(given, compiled), _solve(given, layer), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


def test_checkpointed(device: str) -> None:
    given = problem(LATENT, torch.float32, device)

    def layer(**operands: Any) -> Tensor:
        return checkpoint(flash.attention, use_reentrant=False, **operands)

    for actual, expected in zip(_solve(given, layer), _solve(given), strict=True):
        assert torch.equal(actual, expected)


def test_autocast(device: str) -> None:
    given = problem(LATENT, torch.float32, device)
    halves = given.renewed(lambda tensor: tensor.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        output = flash.attention(**given.operands, **given.options)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, flash.attention(**halves.operands, **given.options))
    query = given.operands["query"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        flash.attention(**given.operands, **given.options).float().sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32


def test_no_gradient_asked(device: str) -> None:
    given = problem(PLAIN, torch.float32, device)
    given.operands["value"].requires_grad_()
    with torch.no_grad():
        assert not flash.attention(**given.operands, **given.options).requires_grad
    output = flash.attention(**given.operands, **given.options)
    output.backward(given.grad)
    assert_close(given.operands["value"].grad, given.reference()[2]["value"], factor=2)
    assert given.operands["key"].grad is None


def test_no_second_derivative(device: str) -> None:
    given = problem(PLAIN, torch.float32, device)
    query = given.operands["query"].requires_grad_()
    output = flash.attention(**given.operands, **given.options)
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(UsageError, match="second derivative"):
        grad.sum().backward()


def test_log_sums_have_no_gradient(device: str) -> None:
    given = problem(PLAIN, torch.float32, device)
    operands = [tensor.requires_grad_() for tensor in given.operands.values()]
    _, total = torch.ops.kvpatch.flash_forward(
        *operands, given.options["span"], 1.0, None, None, None, None
    )
    assert not total.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.ones(1, 2, 5, 12)}, r"key is .* \[1, 2, 5, 16\] was expected"),
        ({"value": torch.ones(1, 1, 5, 16)}, "value is"),
        ({"value": torch.ones(1, 2, 5, 16).half()}, "value is torch.float16"),
        ({"query": torch.ones(1, 3, 5, 16)}, "3 query heads cannot share 2 key heads"),
        ({"span": causal_span(1, 5, 5).long()}, "span is torch.int64"),
        ({"span": causal_span(1, 4, 5)}, "span is"),
        ({"query_rope": torch.ones(1, 4, 5, 16)}, "come together"),
        (
            {"query_rope": torch.ones(1, 4, 5, 16), "key_rope": torch.ones(1, 2, 5, 16)},
            "key_rope is",
        ),
        ({"slopes": torch.ones(4, requires_grad=True)}, "slopes have no gradient"),
        ({"slopes": torch.ones(3)}, "slopes is"),
        ({"scale": -1.0}, "must be greater than 0"),
        ({"softcap": 0.0}, "must be greater than 0"),
    ],
    ids=str,
)
def test_wrong_operands_are_refused(change: dict[str, Any], message: str) -> None:
    operands: dict[str, Any] = {
        "query": torch.ones(1, 4, 5, 16),
        "key": torch.ones(1, 2, 5, 16),
        "value": torch.ones(1, 2, 5, 16),
        "span": causal_span(1, 5, 5),
        "scale": 1.0,
    }
    with pytest.raises(UsageError, match=message):
        flash.attention(**operands | change)


@pytest.mark.parametrize(
    ("dtype", "dim", "rope_dim", "reason"),
    [
        (torch.float32, 256, 0, None),
        (torch.bfloat16, 80, 64, None),
        (torch.float64, 64, 0, "dtype"),
        (torch.float16, 512, 0, "no blocks"),
        (torch.float16, 64, 512, "no blocks"),
    ],
)
def test_what_is_not_supported_has_a_reason(
    dtype: torch.dtype, dim: int, rope_dim: int, reason: str | None, device: str
) -> None:
    found = flash.unsupported(torch.device(device), dtype, dim, dim, rope_dim)
    assert found == reason if reason is None else reason in (found or "")


def test_a_cpu_that_interprets_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    devices.obstacle.cache_clear()
    given = problem(PLAIN, torch.float32, "cpu")
    with pytest.raises(UsageError, match="kernels need cuda"):
        flash.attention(**given.operands, **given.options)
