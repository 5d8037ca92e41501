"""Training, placing and adapting converted models."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpatch.models.sharing_kvpatch import SharedKV
from tests.families.stock import full_logits, random_ids
from tests.helpers import assert_close, assert_equal
from tests.kvpatch.stacks import CLASSIC, converted, pairs, stock_model


def _model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return converted(name, stock_model(name), 2, pairs(name)).to(dtype)


def _gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def _without_dropout(model: Any) -> Any:
    for module in model.modules():
        for key in ("attention_dropout", "output_dropout", "hidden_dropout", "dropout", "p"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return model.train()


@pytest.mark.parametrize("name", CLASSIC)
def test_gradients_are_the_same_with_checkpointing(name: str) -> None:
    model = _without_dropout(_model(name))
    ids = random_ids(model)
    plain = _gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = _gradients(model, ids)
    assert checkpointed.keys() == plain.keys()
    for key, gradient in plain.items():
        assert_equal(checkpointed[key], gradient)


def test_readers_train_the_keys_and_values_of_their_source() -> None:
    """The gradient of a shared projection is the sum over all who read it, by finite difference."""
    model = _without_dropout(_model("stablelm", torch.float64))
    ids = random_ids(model)
    attention = model.get_submodule(model.family.attention_prefix.format(layer=2)[:-1])
    weight = attention.v_proj.weight
    gradient = _gradients(model, ids)[
        model.family.attention_prefix.format(layer=2) + "v_proj.weight"
    ]
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.manual_seed(0))
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * 1e-3 * direction
            losses.append(float(model(ids, labels=ids).loss))
    slope = (losses[0] - losses[1]) / 2e-3
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "stablelm", "gptj"])
def test_two_passes_at_a_time_keep_their_keys_and_values_apart(name: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = _model(name).eval()
    batches = [random_ids(model, seed=seed) for seed in range(8)]

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids).logits  # type: ignore[no-any-return]

    alone = [run(ids) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        for have, want in zip(pool.map(run, batches), alone, strict=True):
            assert_equal(have, want)


# their stock stacks make masks for attention that is written out, or cap its scores
_EAGER_ONLY = {"bloom", "codegen", "gemma2", "gpt_neo", "gptj", "mpt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in CLASSIC if name not in _EAGER_ONLY])
def test_fused_attention_is_as_precise_as_attention_written_out(
    name: str, dtype: torch.dtype
) -> None:
    """Measured by the mean error against float64, which differs by chance alone."""
    exact = _model(name, torch.float64).eval()
    ids = random_ids(exact)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    truth = full_logits(exact, ids, attention_mask=mask)
    errors = {}
    for implementation in ("eager", "sdpa"):
        model = converted(name, stock_model(name), 2, pairs(name)).to(dtype)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            error = (model(ids, attention_mask=mask).logits.double() - truth).abs()
        errors[implementation] = float(torch.cat((error[0], error[1, 3:])).mean())
    assert errors["sdpa"] < 1.5 * errors["eager"]


@pytest.mark.parametrize(
    "name", ["llama", "gpt_neox", "gpt2", "opt", "bloom", "gpt_neo", "codegen", "falcon"]
)
def test_attention_functions_of_others_get_the_heads_unrepeated(name: str) -> None:
    calls: list[tuple[int, Tensor]] = []

    def probe(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((module.layer_idx, key))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kwargs)

    model = _model(name).eval()
    ids = random_ids(model)
    with torch.no_grad():
        want = model(ids).logits
        AttentionInterface.register("kvpatch_probe", probe)
        AttentionMaskInterface.register("kvpatch_probe", sdpa_mask)
        model.set_attn_implementation("kvpatch_probe")
        assert_close(model(ids).logits, want, atol=1e-4)
    assert [layer for layer, _ in calls] == [0, 1, 2, 3]
    assert {key.shape[1] for _, key in calls} == {2}
    for (_, key), source in zip(calls, pairs(name), strict=True):
        assert key is calls[source][1]


def test_compiled_forward_has_no_graph_breaks() -> None:
    model = _model("llama").eval()
    ids = random_ids(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIC)
def test_attention_weights_and_hidden_states_come_out(name: str) -> None:
    model = _model(name).eval()
    ids = random_ids(model)
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 9, 9)] * 4
    assert len(out.hidden_states) == 5
    for weights in out.attentions:
        assert_close(weights.sum(-1), torch.ones(2, 4, 9), atol=1e-5)
        assert not bool(weights.triu(1).any())


@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_layers_placed_by_accelerate_compute_the_same(name: str) -> None:
    model = _model(name).eval()
    ids = random_ids(model)
    with torch.no_grad():
        want = model(ids).logits
        placed = dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
        assert_equal(placed(ids).logits, want)
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        assert_equal(offloaded(ids).logits, want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_low_rank_adapters_attach_to_the_projections(name: str) -> None:
    model = _without_dropout(_model(name))
    ids = random_ids(model)
    want = model(ids).logits.detach()
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    assert_equal(adapted(ids).logits.detach(), want)
    adapted(ids, labels=ids).loss.backward()
    trained = {key for key, weight in adapted.named_parameters() if weight.grad is not None}
    readers = sum(source != layer for layer, source in enumerate(pairs(name)))
    assert len(trained) == 2 * (4 * 4 - 2 * readers)


def test_fsdp_leaves_the_container_alone() -> None:
    """FSDP2 rebuilds every dict, list and tuple among a module's arguments, and no UserDict.

    In a rebuilt container the keys and values a layer stores would be lost to the layers after it.
    """
    from torch.distributed.utils import _apply_to_tensors

    shared = SharedKV({0: (torch.ones(1), torch.zeros(1))})
    assert isinstance(shared, UserDict)
    assert not isinstance(shared, dict)
    assert _apply_to_tensors(lambda tensor: tensor + 1, {"shared": shared})["shared"] is shared


def test_the_container_moves_in_place() -> None:
    shared = SharedKV({0: (torch.ones(1), torch.zeros(1))})
    assert shared.to("meta") is shared
    assert all(state.device.type == "meta" for state in shared[0])


def test_a_layer_that_runs_before_its_source_says_so() -> None:
    with pytest.raises(RuntimeError, match="layer 2 has not run in this forward pass"):
        SharedKV().read(2, torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_layer_alone_cannot_share(name: str) -> None:
    model = _model(name)
    attention = model.get_submodule(model.family.attention_prefix.format(layer=1)[:-1])
    states = torch.zeros(1, 3, model.config.hidden_size)
    positions = torch.arange(3)[None]
    embeddings = (torch.ones(1, 3, attention.head_dim), torch.zeros(1, 3, attention.head_dim))
    with pytest.raises(RuntimeError, match="call the model and not its layers"):
        attention(states, position_embeddings=embeddings, position_ids=positions)
