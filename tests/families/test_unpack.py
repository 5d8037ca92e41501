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
from tests.families.tiny import LAYERS, MODELS
from tests.helpers import assert_close, assert_equal

_PARTS = ("q", "k", "v", "o", "q_norm", "k_norm")
# The one thing in an attention module that the canonical form leaves out: phi's norm, shared by
# all heads, has a bias, which pooling never touches.
_SHARED_NORM_BIASES = ("q_layernorm.bias", "k_layernorm.bias")


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
            if key.startswith(LAYERS.format(layer=layer)) and not key.endswith(_SHARED_NORM_BIASES)
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
        prefix = LAYERS.format(layer=index)
        biases = [tensors.get(prefix + bias) for bias in _SHARED_NORM_BIASES]
        # float64 throughout: 1e-10 leaves room for sums in another order, and for nothing else
        assert_close(_attention(layer, facts, index, x, biases), expected, atol=1e-10)


def _stock_attention(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every attention module for random tokens."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], output[0]))

    for attention in attentions(model):
        attention.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad(), Float64():
        model(random_ids(model), use_cache=False)
    assert len(seen) == model.config.num_hidden_layers
    return seen


def _attention(
    layer: AttentionLayer,
    facts: ModelFacts,
    index: int,
    x: Tensor,
    norm_biases: list[Tensor | None],
) -> Tensor:
    """Causal attention on x [B, T, E], written out from the canonical form and the facts."""
    q = _heads(layer.q, layer.q_bias, x)
    k = _heads(layer.k, layer.k_bias, x)
    v = _heads(layer.v, layer.v_bias, x)
    if layer.q_norm is not None:
        norm = facts.family.qk_norm
        eps = facts.config.get("rms_norm_eps") or facts.config["layer_norm_eps"]
        q = _normalise(q, layer.q_norm, norm, eps, norm_biases[0])
        k = _normalise(k, layer.k_norm, norm, eps, norm_biases[1])
    if facts.clip is not None:
        q, k, v = (heads.clamp(-facts.clip, facts.clip) for heads in (q, k, v))
    q, k = _rotate(q, facts.ropes[index]), _rotate(k, facts.ropes[index])
    reader = torch.arange(layer.geometry.heads) // layer.geometry.group  # KV head of a query head
    scores = facts.scale * torch.einsum("bhid,bhjd->bhij", q, k[:, reader])
    if facts.softcap is not None:
        scores = facts.softcap * torch.tanh(scores / facts.softcap)
    tokens = torch.arange(x.shape[1])
    distance = tokens[:, None] - tokens
    visible = (distance >= 0) & (distance < (facts.windows[index] or len(tokens)))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    out = torch.einsum("bhij,bhjd,ehd->bie", weights, v[:, reader], layer.o)
    return out if layer.o_bias is None else out + layer.o_bias


def _heads(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    """[H, D, E] and [H, D] applied to [B, T, E]: [B, H, T, D]."""
    heads = torch.einsum("hde,bte->bhtd", weight, x)
    return heads if bias is None else heads + bias[:, None]


def _normalise(
    x: Tensor, weight: Tensor | None, norm: QkNorm | None, eps: float, bias: Tensor | None
) -> Tensor:
    """Norm of heads [B, H, T, D] by a weight [D] or [H, D]."""
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
