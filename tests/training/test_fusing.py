"""Fused attention in training: the same losses, and a record of what computed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.loading import load_tokenizer
from convert.training.fusing import computed_by, fuse, on_gpu
from convert.training.loop import Outcome, Training, make_accelerator
from convert.training.recipe import UptrainRecipe
from kvpatch.attention import fused
from kvpatch.models.scores_kvpatch import FUSED
from tests.families.stock import make
from tests.families.tiny import settings
from tests.helpers import assert_close, load_folder
from tests.kernels.interpreter import import_kernels, interpreting
from tests.training.small import Place


@pytest.mark.parametrize(("device", "answer"), [("cuda:1", True), ("cpu", False), ("mps", False)])
def test_kernels_compute_on_cuda_devices(device: str, answer: bool) -> None:
    assert on_gpu(torch.device(device)) is answer


def _trained(place: Place, kind: str, *, fused: bool, tokens: int) -> tuple[Outcome, Any, str]:
    """What came of a run, its model, and its first message."""
    start, said = place.converted(kind), list[str]()
    recipe = UptrainRecipe(
        source=str(start), data=str(place.text), eval_text=str(place.held), eval_samples=2,
        tokens=tokens, batch=2, context=16, lr=1e-3, device="cpu",
    )  # fmt: skip
    with make_accelerator(recipe) as accelerator:
        student = load_folder(start)
        training = Training(
            recipe, accelerator,
            student=student, teacher=load_folder(place.source()), tokenizer=load_tokenizer(start),
            note=said.append, fused=lambda device: fused,
        )  # fmt: skip
        return training.run(), student, said[0]


def _assert_same(place: Place, kind: str, tokens: int) -> Outcome:
    """Fail unless patched models give the losses and weights of models that are not."""
    plain, ours, _ = _trained(place, kind, fused=False, tokens=tokens)
    patched, theirs, said = _trained(place, kind, fused=True, tokens=tokens)
    assert not plain.attention
    functions = [model.config._attn_implementation == FUSED for model in (ours, theirs)]
    assert functions == [False, True]
    assert said.startswith("attention of the student: kernels compute all attention of")
    for have, want in zip(patched.curve, plain.curve, strict=True):
        assert have == pytest.approx(want, rel=1e-5)
    assert plain.curve[-1]["eval_kl"] != plain.curve[0]["eval_kl"]
    for have, want in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert_close(have.detach(), want.detach(), atol=1e-5)
    return patched


@pytest.mark.parametrize("kind", ["gqa", "cla", "mla"])
def test_patched_models_train_to_the_same_losses(kind: str, place: Place) -> None:
    outcome = _assert_same(place, kind, 128)
    assert outcome.attention.keys() == {"student", "teacher"}
    assert all("its device is cpu, and kernels need cuda" in lines[1]
               for lines in outcome.attention.values())  # fmt: skip


def test_kernels_train_packed_documents_to_the_same_losses(place: Place) -> None:
    with interpreting():
        import_kernels()
        outcome = _assert_same(place, "gqa", 32)
    layers = len(load_folder(place.source()).model.layers)
    for lines in outcome.attention.values():
        assert lines[0] == f"kernels compute all attention of {layers} of {layers} modules"


def test_the_record_is_of_the_dtype_that_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are in the dtype of autocast, and weights in another."""
    model, asked = make("llama", settings("llama")), list[torch.dtype]()
    choose = fused.choose

    def noted(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> tuple[str, str | None]:
        asked.extend(operand.dtype for operand in (query, key, value))
        return choose(query, key, value, **how)

    monkeypatch.setattr(fused, "choose", noted)
    for dtype in (torch.float32, torch.bfloat16):
        asked.clear()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            computed_by(model)
        assert set(asked) == {dtype}


def test_a_model_that_kernels_know_nothing_of_is_left_alone() -> None:
    falcon = make("falcon", settings("falcon") | {"alibi": True})
    before = falcon.config._attn_implementation
    fuse(falcon)
    assert falcon.config._attn_implementation == before
    assert "prefill stock" in computed_by(falcon)[1]


def test_nothing_changes_on_the_cpu(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = place.uptrain(place.converted("gqa"), out, "--tokens", "32")
    assert run.code == 0, run.err
    assert "attention of the" not in run.err
