"""Losses of whole models: packed against each document alone, by the stock forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from convert.training.data import IGNORED, Batch, Piece, Sequences, stack
from convert.training.groups import adapted_modules, parameter_groups, rate_factor
from convert.training.student import Distillation, Weights, packs
from tests.families.stock import Float64, make
from tests.families.tiny import settings
from tests.helpers import assert_close, load_folder
from tests.training.small import Place

DOCUMENTS = [list(range(5, 11)), list(range(30, 33)), list(range(50, 64)), [9, 8, 7, 70]]


def _batch(*, packed: bool) -> Batch:
    stream = Sequences(
        lambda: (Piece(str(index)) for index in range(len(DOCUMENTS))),
        lambda piece: DOCUMENTS[int(piece.text)],
        context=8,
        seed=None,
        packed=packed,
    )
    return stack(stream.whole(3))


def _documents(batch: Batch) -> list[list[int]]:
    """Parts of documents in a batch, read off its positions and targets alone."""
    found: list[list[int]] = []
    for tokens, positions, targets in zip(*batch, strict=True):
        for token, position, target in zip(tokens, positions, targets, strict=True):
            if position == 0:
                found.append([])
            found[-1].append(int(token))
            if target != IGNORED:
                continue
    return found


def _alone(model: Any, documents: list[list[int]]) -> Tensor:
    """Log probabilities [N, V] of all predictions inside documents, each run alone."""
    rows = [model(torch.tensor([ids])).logits[0, :-1] for ids in documents if len(ids) > 1]
    return torch.cat(rows).log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gqa", "cla", "mla"])
def test_losses_of_packed_documents_are_those_of_each_alone(kind: str, place: Place) -> None:
    folder = place.source() if kind == "llama" else place.converted(kind)
    student = load_folder(folder, torch.float64)
    teacher = load_folder(place.source(), torch.float64)
    with Float64():
        assert packs(student)
        batch = _batch(packed=True)
        losses = Distillation(student, teacher, packed=True)(*batch, Weights(1.0, 0.5, 0.0))
        documents = _documents(batch)
        with torch.no_grad():
            ours, theirs = _alone(student, documents), _alone(teacher, documents)
    targets = torch.tensor([token for ids in documents for token in ids[1:]])
    kl = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    ce = F.nll_loss(ours, targets, reduction="sum")
    assert_close(losses.kl, kl, atol=1e-10)
    assert_close(losses.ce, ce, atol=1e-10)
    assert_close(losses.total.detach(), kl + 0.5 * ce, atol=1e-10)


@pytest.mark.parametrize("name", ["bloom", "mpt", "opt"])
def test_classes_that_cannot_keep_documents_apart_get_one_each(name: str) -> None:
    model = make(name, settings(name)).double().eval()
    assert not packs(model)
    batch = _batch(packed=False)
    with Float64():
        losses = Distillation(model, None, packed=False)(*batch, Weights(0.0, 1.0, 0.0))
        want = torch.zeros((), dtype=torch.float64)
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            length = int((targets != IGNORED).sum()) + 1
            ids = tokens[None, :length]
            with torch.no_grad():
                rows = model(ids).logits[0, :-1].log_softmax(-1)
            want += F.nll_loss(rows, ids[0, 1:], reduction="sum")
    assert_close(losses.ce, want, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi", "gemma2"])
def test_stock_classes_that_take_positions_pack(name: str) -> None:
    assert packs(make(name, settings(name)).eval())


def test_a_teacher_is_no_part_of_the_student(place: Place) -> None:
    student, teacher = (load_folder(place.source()) for _ in range(2))
    module = Distillation(student, teacher, packed=True)
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    losses = module(*_batch(packed=True), Weights(1.0, 0.0, 1.0))
    losses.total.backward()
    assert float(losses.kl.abs() + losses.hidden_mse) < 1e-4
    assert all(weight.grad is None for weight in teacher.parameters())


def test_errors_of_hidden_states_are_counted_and_train(place: Place) -> None:
    student = load_folder(place.converted("gqa"), torch.float64)
    teacher = load_folder(place.source(), torch.float64)
    batch = _batch(packed=True)
    losses = Distillation(student, teacher, packed=True)(*batch, Weights(1.0, 0.0, 2.0))
    rows = batch.targets != IGNORED
    want = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = (
            model(
                batch.tokens,
                position_ids=batch.positions,
                use_cache=False,
                output_hidden_states=True,
            )
            for model in (student, teacher)
        )
    layers = list(zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True))
    for mine, truth in layers:
        error = (mine - truth).square().sum(-1) / truth.square().sum(-1)
        want += error[rows].sum() / len(layers)
    assert_close(losses.hidden_mse, want, atol=1e-8)
    assert float(losses.total.detach()) == pytest.approx(float(losses.kl) + 2 * float(want))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_groups_part_the_attention_from_all_others(name: str) -> None:
    model = make(name, settings(name))
    first, rest = parameter_groups(model, "attention-then-all")
    assert not first.late
    assert rest.late
    assert first.parameters.keys() | rest.parameters.keys() == dict(model.named_parameters()).keys()
    assert not first.parameters.keys() & rest.parameters.keys()
    assert all("att" in key for key in first.parameters)
    assert not any("attn." in key or "attention." in key for key in rest.parameters)
    assert len(parameter_groups(model, "attention")) == 1
    assert not any(weight.requires_grad for weight in rest.parameters.values())


def test_adapters_go_to_matrices_and_not_to_the_head() -> None:
    model = make("llama", settings("llama"))
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    found = {name.rpartition(".")[2] for name in adapted_modules(model, "attention")}
    assert found == attention
    found = {name.rpartition(".")[2] for name in adapted_modules(model, "all")}
    assert found == attention | {"gate_proj", "up_proj", "down_proj"}
    found = {
        name.rpartition(".")[2]
        for name in adapted_modules(make("gpt2", settings("gpt2")), "attention")
    }
    assert found == {"c_attn", "c_proj"}


def test_models_that_share_layers_learn_faster(place: Place) -> None:
    rates = {
        kind: rate_factor(load_folder(place.converted(kind)).config) for kind in ("gqa", "cla")
    }
    assert rates == {"gqa": 1.0, "cla": 1.5}
    assert rate_factor({"kv_source_layers": [0, 0]}) == 1.5
    assert rate_factor({}) == 1.0
