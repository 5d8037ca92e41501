"""Ways to compute attention: our kernels and what else there is, by the op of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Machine
from kvpatch.models.absorbed_kvpatch import absorbed_attention

if TYPE_CHECKING:
    from benchmarks.kernels import Case

__all__ = ["WAYS"]

Ways = Mapping[str, Callable[[], Any]]

_BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


class _Operands:
    """Random tensors of a case: [B, H, T, D], each token's heads together as projections give them.

    Args:
        case: What is computed.
        machine: Where they are.
    """

    def __init__(self, case: Case, machine: Machine) -> None:
        def states(heads: int, tokens: int, width: int) -> Tensor:
            return machine.random(case.batch, tokens, heads, width).transpose(1, 2)

        def cached(heads: int, width: int) -> Tensor:
            return machine.random(case.batch, heads, case.keys, width)

        fresh = case.queries == case.keys
        keys = partial(states, tokens=case.keys) if fresh else cached
        self.query = states(case.heads, case.queries, case.dim)
        self.key = keys(case.kv_heads, width=case.dim)
        self.value = keys(case.kv_heads, width=case.value_dim)
        self.rope: dict[str, Tensor] = {}
        if case.rope_dim:
            self.rope["query_rope"] = states(case.heads, case.queries, case.rope_dim)
            self.rope["key_rope"] = keys(1, width=case.rope_dim)
        end = torch.arange(case.keys - case.queries + 1, case.keys + 1, device=machine.device)
        start = torch.full_like(end, case.padding)
        # what sees nothing, for padding that attends: an empty span
        span = torch.stack((torch.minimum(start, end), end), -1).to(torch.int32)
        self.span = span.expand(case.batch, -1, -1).contiguous()
        self.scale = (case.dim + case.rope_dim) ** -0.5
        at = torch.arange(case.keys, device=machine.device)
        self.mask = ((at >= span[:, :1]) & (at < span[:, 1:]))[None, None]
        # torch has no rotary part apart: it is given what stock classes concatenate
        self.whole_query, self.whole_key = self.query, self.key
        if self.rope:
            shared = self.rope["key_rope"].expand(-1, case.kv_heads, -1, -1)
            self.whole_query = torch.cat((self.query, self.rope["query_rope"]), -1)
            self.whole_key = torch.cat((self.key, shared), -1)

    def leaves(self) -> list[Tensor]:
        """What there are gradients of for our op."""
        return [self.query, self.key, self.value, *self.rope.values()]

    def whole_leaves(self) -> list[Tensor]:
        """The same for the others."""
        return [self.whole_query, self.whole_key, self.value]


def _fused(operands: _Operands) -> Tensor:
    from kvpatch.kernels import flash

    return flash.attention(
        operands.query,
        operands.key,
        operands.value,
        operands.span,
        scale=operands.scale,
        **operands.rope,
    )


def _sdpa(case: Case, operands: _Operands, backend: SDPBackend) -> Tensor:
    """Without a mask where causality says it all, as transformers does."""
    plain = not case.padding and case.queries in {1, case.keys}
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            operands.whole_query,
            operands.whole_key,
            operands.value,
            attn_mask=None if plain else operands.mask,
            is_causal=plain and case.queries > 1,
            scale=operands.scale,
            enable_gqa=case.heads != case.kv_heads,
        ).transpose(1, 2)


def _transformers(case: Case, operands: _Operands) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = case.heads // case.kv_heads
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)
    output: Tensor = sdpa_attention_forward(
        module,
        operands.whole_query,
        operands.whole_key,
        operands.value,
        operands.mask,
        scaling=operands.scale,
    )[0]
    return output


def _flex(case: Case, operands: _Operands, machine: Machine) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    past = case.keys - case.queries

    def visible(b: Tensor, h: Tensor, t: Tensor, n: Tensor) -> Tensor:
        return (n <= t + past) & (n >= case.padding)

    mask = create_block_mask(visible, None, None, case.queries, case.keys, device=machine.device)
    # what it compiles to on a CPU is another kernel, of no interest here
    attend = torch.compile(flex_attention) if machine.is_gpu else flex_attention

    def way() -> Tensor:
        output: Any = attend(
            operands.whole_query,
            operands.whole_key,
            operands.value,
            block_mask=mask,
            scale=operands.scale,
            enable_gqa=case.heads != case.kv_heads,
        )
        return output.transpose(1, 2)

    return way


def _forward(case: Case, machine: Machine) -> Ways:
    operands = _Operands(case, machine)
    return _single({"kvpatch": partial(_fused, operands), **_others(case, operands, machine)})


def _others(case: Case, operands: _Operands, machine: Machine) -> dict[str, Callable[[], Tensor]]:
    return {
        **{name: partial(_sdpa, case, operands, it) for name, it in _BACKENDS.items()},
        "flex": _flex(case, operands, machine),
        "transformers with mask": partial(_transformers, case, operands),
    }


def _backward(case: Case, machine: Machine) -> Ways:
    """Gradients alone; the forward pass is computed once."""
    operands = _Operands(case, machine)
    grad = machine.random(case.batch, case.queries, case.heads, case.value_dim)
    ours, theirs = operands.leaves(), operands.whole_leaves()
    for leaf in (*ours, *theirs):
        leaf.requires_grad_()
    if operands.rope:  # leaves of their own, not sums of ours
        theirs[:2] = [leaf.detach().requires_grad_() for leaf in theirs[:2]]
        operands.whole_query, operands.whole_key = theirs[:2]

    def of(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
        outputs: list[Tensor] = []

        def way() -> list[Tensor]:
            if not outputs:
                outputs.append(forward())
            grads = torch.autograd.grad(outputs[0], leaves, grad, retain_graph=True)
            # what all ways have: queries without the rotary part, and values
            return [grads[0][..., : case.dim], grads[2]]

        return way

    ways = {name: of(way, theirs) for name, way in _others(case, operands, machine).items()}
    return {"kvpatch": of(partial(_fused, operands), ours), **ways}


def _decode(case: Case, machine: Machine) -> Ways:
    from kvpatch.kernels import decode

    operands = _Operands(case, machine)

    def ours() -> Tensor:
        return decode.attention(
            operands.query, operands.key, operands.value, operands.span, scale=operands.scale
        )

    return _single({"kvpatch": ours, **_others(case, operands, machine)})


def _single(ways: Mapping[str, Callable[[], Tensor]]) -> Ways:
    """Ways whose one output is compared."""

    def listed(way: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [way()]

    return {name: listed(way) for name, way in ways.items()}


def _latent_ways(case: Case, machine: Machine) -> tuple[_Operands, dict[str, Any]]:
    from kvpatch.kernels import decode

    operands = _Operands(case, machine)
    rope = operands.rope

    def ours(query: Tensor) -> Tensor:
        return decode.latent_attention(
            query, rope["query_rope"], operands.key, rope["key_rope"], operands.span,
            scale=operands.scale,
        )  # fmt: skip

    def absorbed(query: Tensor) -> Tensor:
        output, _ = absorbed_attention(
            query, rope["query_rope"], operands.key, rope["key_rope"], None, scaling=operands.scale
        )
        return output.transpose(1, 2)

    return operands, {"kvpatch": ours, "torch absorbed": absorbed}


def _latent_decode(case: Case, machine: Machine) -> Ways:
    """Attention to the latents alone."""
    operands, ways = _latent_ways(case, machine)
    return _single({name: partial(way, operands.query) for name, way in ways.items()})


def _latent_step(case: Case, machine: Machine) -> Ways:
    """With the up-projections, which the stock classes apply to all that is cached."""
    operands, ways = _latent_ways(case, machine)
    width = case.dim // 4  # of a head without positions, as in DeepSeek-V2
    nope = machine.random(case.batch, case.heads, case.queries, width)
    key_up, value_up = machine.random(2, case.heads, width, case.dim)

    def moved(way: Callable[[Tensor], Tensor]) -> Tensor:
        output = way(torch.einsum("bhtd,hdr->bhtr", nope, key_up))
        return torch.einsum("bthr,hdr->bthd", output, value_up)

    def stock() -> Tensor:
        both = torch.cat((key_up, value_up), 1).flatten(0, 1)
        expanded = F.linear(operands.key.squeeze(1), both)
        keys, values = (
            expanded.unflatten(-1, (case.heads, 2 * width)).transpose(1, 2).split(width, -1)
        )
        shared = operands.rope["key_rope"].expand(-1, case.heads, -1, -1)
        return F.scaled_dot_product_attention(
            torch.cat((nope, operands.rope["query_rope"]), -1),
            torch.cat((keys, shared), -1),
            values,
            scale=operands.scale,
        ).transpose(1, 2)

    return _single(
        {**{name: partial(moved, way) for name, way in ways.items()}, "stock expanded": stock}
    )


WAYS: Mapping[str, Callable[[Case, Machine], Ways]] = {
    "forward": _forward,
    "backward": _backward,
    "decode": _decode,
    "latent_decode": _latent_decode,
    "latent_step": _latent_step,
}
