"""The canonical form means what it says: it packs back, and it computes stock attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from convert.checkpoint.reader import read_json
from convert.facts import ModelFacts, read_facts
from convert.families import pack, tensor_names, unpack
from convert.layer import AttentionLayer, QkNorm, Rope
from tests.families.stock import Checkpoints, Float64, attentions, load, random_ids
from tests.families.tiny import MODELS, attention, family
from tests.helpers import assert_close, assert_equal

_PARTS = ("q", "k", "v", "o", "q_norm", "k_norm")
# families that scale the ALiBi bias like the scores
_SCALED_ALIBI = {"falcon"}


def _facts(folder: Path) -> ModelFacts:
    return read_facts(read_json(folder / "config.json"))


@pytest.mark.parametrize("name", MODELS)
def test_packing_an_unpacked_layer_gives_all_its_tensors_back(
    checkpoint: Checkpoints, name: str
) -> None:
    folder = checkpoint(name)
    facts, tensors = _facts(folder), load_file(folder / "model.safetensors")
    for layer in range(facts.layers):
        on_disk = {
            key: tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{attention(family(name)).format(layer=layer)}.")
        }
        packed = pack(unpack(tensors, facts.family, facts.geometry, layer), facts.family, layer)
        assert packed.keys() == on_disk.keys()
        assert packed.keys() <= set(tensor_names(facts.family, facts.geometry, layer, _PARTS))
        for key, tensor in packed.items():
            assert_equal(tensor, on_disk[key])


@pytest.mark.parametrize("name", MODELS)
def test_canonical_attention_is_stock_attention(checkpoint: Checkpoints, name: str) -> None:
    folder = checkpoint(name)
    facts, model = _facts(folder), load(folder)
    tensors = {k: t.double() for k, t in load_file(folder / "model.safetensors").items()}
    for index, (x, expected) in enumerate(_stock_attention(model)):
        layer = unpack(tensors, facts.family, facts.geometry, index)
        # float64 throughout: 1e-10 leaves room for sums in another order, and for nothing else
        assert_close(_attention(layer, facts, index, x), expected, atol=1e-10)


@torch.no_grad()
def _stock_attention(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Input of every attention module, and output of its last linear map, for random tokens."""
    modules = attentions(model)
    inputs, outputs = {}, {}

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        inputs[module] = args[0] if args else kwargs["hidden_states"]

    for module in modules:
        module.register_forward_pre_hook(enter, with_kwargs=True)
        for child in module.children():
            # the child that runs last leaves its output here
            child.register_forward_hook(
                lambda _, __, output, module=module: outputs.update({module: output})
            )
    with Float64():
        model(random_ids(model), use_cache=False)
    assert len(inputs) == len(outputs) == model.config.num_hidden_layers
    return [(inputs[module], outputs[module]) for module in modules]


def _attention(layer: AttentionLayer, facts: ModelFacts, index: int, x: Tensor) -> Tensor:
    """Causal attention on x [B, T, E], written out from the canonical form and the facts."""
    q = _heads(layer.q, layer.q_bias, x)
    k = _heads(layer.k, layer.k_bias, x)
    v = _heads(layer.v, layer.v_bias, x)
    if layer.q_norm is not None:
        norm = facts.family.qk_norm
        eps = facts.config.get("rms_norm_eps") or facts.config["layer_norm_eps"]
        q = _normalise(q, layer.q_norm, layer.q_norm_bias, norm, eps)
        k = _normalise(k, layer.k_norm, layer.k_norm_bias, norm, eps)
    if facts.clip is not None:
        q, k, v = (heads.clamp(-facts.clip, facts.clip) for heads in (q, k, v))
    q, k = _rotate(q, facts.ropes[index]), _rotate(k, facts.ropes[index])
    reader = torch.arange(layer.geometry.heads) // layer.geometry.group  # KV head of a query head
    scores = facts.scales[index] * torch.einsum("bhid,bhjd->bhij", q, k[:, reader])
    if facts.softcap is not None:
        scores = facts.softcap * torch.tanh(scores / facts.softcap)
    tokens = torch.arange(x.shape[1])
    distance = tokens[:, None] - tokens
    if facts.family.positions == "alibi":
        scores = scores - _alibi(facts)[:, None, None] * distance
    visible = (distance >= 0) & (distance < (facts.windows[index] or len(tokens)))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    out = torch.einsum("bhij,bhjd,ehd->bie", weights, v[:, reader], layer.o)
    return out if layer.o_bias is None else out + layer.o_bias


def _alibi(facts: ModelFacts) -> Tensor:
    """Slopes [H] of arXiv:2108.12409, section 3, for a power of two of heads."""
    heads = facts.geometry.heads
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    return slopes * (facts.scales[0] if facts.family.model_type in _SCALED_ALIBI else 1)


def _heads(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    """[H, D, E] and [H, D] applied to [B, T, E]: [B, H, T, D]."""
    heads = torch.einsum("hde,bte->bhtd", weight, x)
    return heads if bias is None else heads + bias[:, None]


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: QkNorm | None, eps: float
) -> Tensor:
    """Norm of heads [B, H, T, D] by a weight [D] or [H, D], and a bias [D]."""
    assert norm is not None
    assert weight is not None
    assert weight.dim() == (1 if norm.layout == "shared" else 2)
    over = (1, 3) if norm.layout == "full" else (3,)
    if norm.formula == "layer":
        x = x - x.mean(over, keepdim=True)
    x = x / (x.square().mean(over, keepdim=True) + eps).sqrt()
    scale = weight + 1 if norm.formula == "rms_plus_one" else weight
    x = x * (scale if norm.layout == "shared" else scale[:, None])
    return x if bias is None else x + bias


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE on [B, H, T, D]: each pair of dims is a complex number that turns with the position."""
    assert rope.kind == "default"
    if rope.dim == 0:
        return x
    half = rope.dim // 2
    i = torch.arange(half)
    real, imaginary = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
    frequency = rope.theta ** (-2 * i.double() / rope.dim)
    angle = torch.arange(x.shape[2]).double()[:, None] * frequency
    turned = torch.complex(x[..., real], x[..., imaginary]) * torch.polar(
        torch.ones_like(angle), angle
    )
    out = x.clone()
    out[..., real], out[..., imaginary] = turned.real, turned.imag
    return out
