"""The latent norm that does nothing: its error is as predicted, and below rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.families import unpack
from convert.methods.latent import embedded
from convert.targets.deepseek_layer import largest_latent
from convert.targets.inert import constant_norm, epsilon_norm
from kvpatch.errors import UsageError
from tests.families.stock import Float64, full_logits, load, random_ids
from tests.families.tiny import family
from tests.helpers import rewrite_tensors
from tests.targets.applying import facts_of
from tests.targets.latent_sources import (
    save,
    target_of,
    write_latent,
)


@pytest.fixture
def source(tmp_path: Path, name: str) -> Path:
    """A stock model with biases of standard deviation 2."""
    return save(tmp_path / "source", name)


@pytest.mark.parametrize("inert", ["constant", "epsilon"])
@pytest.mark.parametrize("name", ["llama", "gemma", "smollm3"])
@torch.no_grad()
def test_the_norms_of_a_model_err_as_predicted(
    source: Path, tmp_path: Path, name: str, inert: str
) -> None:
    """A bound far too small makes the error visible; what follows the norm has just that error."""
    foreseen = 1e-5
    result = write_latent(source, tmp_path / "out", inert=inert, largest=foreseen)
    model, seen = load(result), []
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0], output))
        )
    expected = load(source)
    ids = random_ids(expected)
    error = (full_logits(model, ids) - full_logits(expected, ids)).abs().max()
    assert 1e-10 < float(error) < 1e-2
    assert len(seen) == len(model.model.layers)
    width = model.config.kv_lora_rank
    form = (constant_norm if inert == "constant" else epsilon_norm)(foreseen, width, torch.float64)
    rank = width - (inert == "constant")
    for before, after in seen:
        latents, found = before[..., :rank] / form.rows, after[..., :rank] * form.up
        sizes = latents.norm(dim=-1)
        assert float(sizes.min()) > 0.1
        relative = (found - latents).norm(dim=-1) / sizes
        predicted = torch.tensor([form.error(float(size)) for size in sizes.flatten()])
        assert bool((relative.flatten() <= predicted * (1 + 1e-6)).all())
        assert bool((relative.flatten() >= predicted * 0.99 - 1e-14).all())


@pytest.mark.parametrize("rank", [1, 2, 24, 513])
@pytest.mark.parametrize("largest", [1e-4, 0.7, 30.0, 6e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", [constant_norm, epsilon_norm])
@torch.no_grad()
def test_an_inert_norm_changes_no_latent_by_a_rounding(
    form: Any, dtype: torch.dtype, largest: float, rank: int
) -> None:
    """Against the norm of the stock class, in float64."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    constant = form is constant_norm
    if dtype is torch.float16 and not constant:
        return
    inert = form(largest, rank + constant, dtype)
    rounding = torch.finfo(dtype).eps / 2
    assert inert.error(largest) <= rounding / 4
    assert inert.error(2 * largest) <= rounding
    for power in (inert.rows, inert.weight, inert.unit_weight):
        assert torch.tensor(power).frexp().mantissa == 0.5
    for value in (inert.bias, inert.rows, inert.weight):
        assert float(torch.tensor(value, dtype=dtype)) == value
    assert 1 <= inert.up < 2 or (dtype is torch.float16 and inert.weight == 2.0**15)
    norm = DeepseekV3RMSNorm(rank + constant).double()
    norm.weight.fill_(inert.weight)
    latents = torch.randn(50, rank, generator=torch.Generator().manual_seed(rank)).double()
    latents *= (largest / latents.norm(dim=-1) * torch.logspace(0, -3, 50).double())[:, None]
    inputs = latents * inert.rows
    if constant:
        norm.weight[-1] = inert.unit_weight
        inputs = torch.nn.functional.pad(inputs, (0, 1), value=inert.bias)
    with Float64():
        out = norm(inputs)
    errors = (out[:, :rank] * inert.up - latents).norm(dim=-1) / latents.norm(dim=-1)
    predicted = torch.tensor([inert.error(float(size)) for size in latents.norm(dim=-1)])
    assert bool((errors <= predicted + 1e-14).all())
    if constant:
        assert bool(((out[:, -1] / inert.unit - 1).abs() <= predicted + 1e-14).all())
        assert 0 < inert.unit <= 1


@pytest.mark.parametrize("name", ["llama", "gemma:bias-untied", "granite"])
@torch.no_grad()
def test_no_input_gives_a_larger_latent_than_the_bound(source: Path, name: str) -> None:
    facts, stored = facts_of(source)
    model = load(source)
    for index, layer in enumerate(model.model.layers):
        tensors = {n: t.double() for n, t in stored.items() if f"layers.{index}." in n}
        whole = unpack(tensors, facts.family, facts.geometry, index, rope=facts.ropes[index])
        latent = embedded(whole, facts.scales[index]).latent
        weight = tensors[f"model.layers.{index}.input_layernorm.weight"] + (family(name) == "gemma")
        bound = largest_latent(latent, weight)
        worst = torch.linalg.svd(latent * weight).Vh[0]
        inputs = torch.cat([torch.randn(200, facts.geometry.hidden).double() * 9, worst[None]])
        with Float64():
            sizes = (layer.input_layernorm(inputs) @ latent.T).norm(dim=-1)
        assert float(sizes.max()) <= bound
        assert float(sizes[-1]) >= 0.99 * bound  # eps keeps it below


def test_float16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    facts, _ = facts_of(save(tmp_path / "source", "llama"))
    assert target_of(facts, dtype="float16", largest=6e4) is not None
    with pytest.raises(UsageError, match=r"latents up to 7e.04 overflow in float16") as error:
        target_of(facts, dtype="float16", largest=7e4)
    assert error.value.hint == "Choose --dtype bfloat16 or float32."
    assert target_of(facts, dtype="bfloat16", largest=7e4) is not None
    with pytest.raises(UsageError, match="below those of float16"):
        target_of(facts, dtype="float16", inert="epsilon")


def test_float16_that_the_weights_would_overflow_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    rewrite_tensors(source, {n: w * 3e4 for n, w in weights.items() if "v_proj" in n})
    with pytest.raises(UsageError, match="overflow in float16"):
        write_latent(source, tmp_path / "out", dtype="float16")
