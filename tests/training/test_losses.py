"""Losses in parts of the vocabulary against the plain formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convert.training.losses import Head, hidden_errors, token_losses
from convert.training.student import check_head, head_of
from kvpatch.errors import InputModelError
from tests.families.stock import make, random_ids
from tests.families.tiny import settings
from tests.helpers import assert_close

N, E, V = 5, 6, 23
FORMS = {"plain": (1.0, None), "scaled": (0.7, None), "capped": (1.3, 2.0)}


def _made(seed: int, form: str, width: int = E) -> tuple[Tensor, Head]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(N, width), Head(draw(V, width), draw(V), *FORMS[form])


def _plain(hidden: Tensor, head: Head) -> Tensor:
    logits = F.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.cap is None else head.cap * (logits / head.cap).tanh()


TARGETS = torch.tensor([0, 4, 5, 22, 7])


@pytest.mark.parametrize("columns", [1, 5, V, 100])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_those_of_the_plain_formulas(form: str, columns: int) -> None:
    (hidden, head), (taught, teacher) = _made(0, form), _made(1, form, 4)
    leaves = [hidden, head.weight, head.bias]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    ours, theirs = (_plain(hidden, head).log_softmax(-1), _plain(taught, teacher).log_softmax(-1))
    want = (
        F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1),
        F.nll_loss(ours, TARGETS, reduction="none"),
    )
    have = token_losses(hidden, head, TARGETS, taught, teacher, columns=columns)
    share = torch.linspace(0.5, 2, N, dtype=torch.float64)
    for ours_, theirs_ in zip(have, want, strict=True):
        assert_close(ours_.detach(), theirs_.detach(), atol=1e-10)
    gradients = [
        torch.autograd.grad((kl * share).sum() + 0.3 * (ce * share**2).sum(), leaves)  # type: ignore[arg-type]
        for kl, ce in (have, want)
    ]
    for mine, truth in zip(*gradients, strict=True):
        assert_close(mine, truth, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    (hidden, head), (taught, teacher) = _made(2, form), _made(3, form)

    def losses(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        own = Head(weight, bias, head.scale, head.cap)
        return token_losses(hidden, own, TARGETS, taught, teacher, columns=7)

    assert head.bias is not None
    leaves = [leaf.requires_grad_() for leaf in (hidden, head.weight, head.bias)]
    assert torch.autograd.gradcheck(losses, leaves)


def test_without_a_teacher_there_is_cross_entropy_alone() -> None:
    hidden, head = _made(4, "plain")
    hidden.requires_grad_()
    kl, ce = token_losses(hidden, head, TARGETS, columns=4)
    want = F.cross_entropy(_plain(hidden, head), TARGETS, reduction="none")
    assert not kl.any()
    (mine,) = torch.autograd.grad(kl.sum() + ce.sum(), hidden, retain_graph=True)
    (truth,) = torch.autograd.grad(want.sum(), hidden)
    assert_close(mine, truth, atol=1e-10)


class _Largest(TorchDispatchMode):
    """Notes the largest number of elements of any tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return made


def test_logits_of_all_tokens_never_exist() -> None:
    tokens, width, vocabulary, columns = 300, 4, 500, 50
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = Head(torch.randn(vocabulary, width, requires_grad=True))
    teacher = Head(torch.randn(vocabulary, width))
    targets = torch.arange(tokens)
    with _Largest() as largest:
        kl, ce = token_losses(hidden, head, targets, hidden.detach(), teacher, columns=columns)
        (kl + ce).sum().backward()
    assert largest.most <= tokens * columns < tokens * vocabulary
    assert hidden.grad is not None


def test_autocast_computes_logits_in_its_dtype_and_losses_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(N, 64, requires_grad=True)
    head = Head(torch.randn(V, 64, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        _, ce = token_losses(hidden, head, TARGETS)
    ce.sum().backward()
    assert ce.dtype is torch.float32
    logits = (hidden.detach().bfloat16() @ head.weight.detach().bfloat16().T).float()
    assert_close(ce.detach(), F.cross_entropy(logits, TARGETS, reduction="none"), atol=1e-5)
    assert hidden.grad is not None
    assert hidden.grad.dtype is torch.float32


def test_hidden_errors_are_shares_of_the_teachers_square() -> None:
    torch.manual_seed(0)
    truth = [torch.randn(N, E, dtype=torch.float64) for _ in range(3)]
    ours = [(1 + share) * layer for share, layer in zip((0.1, 0.2, 0.3), truth, strict=True)]
    want = torch.full((N,), (0.01 + 0.04 + 0.09) / 3, dtype=torch.float64)
    assert_close(hidden_errors(ours, truth), want, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2", "opt"])
@torch.no_grad()
def test_heads_are_those_of_the_classes(name: str) -> None:
    model = make(name, settings(name)).eval()
    ids = random_ids(model)
    hidden = model.base_model(ids).last_hidden_state
    want = model(ids).logits
    assert_close(head_of(model).logits(hidden), want, atol=1e-5 * float(want.abs().max()))
    check_head(model)


def test_a_head_that_is_not_known_is_refused() -> None:
    model = make("llama", settings("llama"))
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.sin())
    with pytest.raises(InputModelError, match="does something to its logits"):
        check_head(model)
