"""One tensor of the source that becomes several of the result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.facts import ModelFacts
from convert.pipeline import convert
from convert.recipe import make_recipe
from convert.targets import targets_for
from convert.targets.target import Rewrite, Target
from tests.helpers import assert_equal


def test_one_tensor_becomes_several_on_the_way_through_the_engine(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy, a product and the two halves of one tensor: as bytes, in pieces and as a whole."""
    name = "model.embed_tokens.weight"

    def rename(own: str) -> Rewrite | tuple[Rewrite, ...]:
        halves = (lambda t: t.chunk(2)[0], lambda t: t.chunk(2)[1])
        return (
            Rewrite(own)
            if own != name
            else (
                Rewrite(own),
                Rewrite("third", lambda t: t.double() / 3, elementwise=True),
                Rewrite("upper", halves[0]),
                Rewrite("lower", halves[1]),
            )
        )

    def chosen(facts: ModelFacts, **options: Any) -> tuple[Target, ...]:
        return (dataclasses.replace(targets_for(facts, **options)[0], rename=rename),)

    monkeypatch.setattr("convert.scheme.targets_for", chosen)
    recipe = {"method": "mqa", "source": str(demo_model), "output": str(tmp_path / "out")}
    weights = load_file(convert(make_recipe(recipe)) / "model.safetensors")
    before = load_file(demo_model / "model.safetensors")[name]
    assert_equal(weights[name], before)
    assert_equal(weights["third"], (before.double() / 3).to(before.dtype))
    assert_equal(torch.cat([weights["upper"], weights["lower"]]), before)
