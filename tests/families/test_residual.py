"""How a row says the attention joins the residual stream, against what the stock layers do.

The output of the output projection is held fixed, whatever goes in. Then a layer with attention in
front of the feed-forward block is a function of ``x + m * a`` alone, one with both side by side is
``m * a`` and a function of ``x``, and a norm between attention and residual stream breaks both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from tests.families.stock import Checkpoints, Float64, attentions, load, random_ids
from tests.families.tiny import MODELS, SIZES
from tests.helpers import assert_close

# the last linear map of an attention module, under any of its names
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


@torch.no_grad()
def _first_layer(model: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Output of the first layer for its input [B, T, E] and the attention's output [B, T, E]."""
    attention = attentions(model)[0]
    (layer,) = (
        module
        for name, module in model.named_modules()
        if name.endswith(".0") and attention in module.modules() and name.count(".0") == 1
    )
    output = next(getattr(attention, name) for name in _OUTPUTS if hasattr(attention, name))
    seen: list[Tensor] = []

    def replace_input(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (x, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": x}

    def keep(_: Any, __: Any, result: Any) -> None:
        seen.append(result[0] if isinstance(result, tuple) else result)

    hooks = [
        layer.register_forward_pre_hook(replace_input, with_kwargs=True),
        layer.register_forward_hook(keep),
        output.register_forward_hook(lambda *_: attended),
    ]
    with Float64():
        model(random_ids(model), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_rows_say_how_attention_joins_the_residual_stream(
    checkpoint: Checkpoints, name: str
) -> None:
    folder = checkpoint(name)
    model = load(folder)
    facts = read_facts(read_json(folder / "config.json"))
    generator = torch.Generator().manual_seed(3)
    shape = (*random_ids(model).shape, facts.geometry.hidden)
    x, attended, more = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    joined = facts.residual_multiplier * more
    added = _first_layer(model, x, attended + more)
    in_turn = _first_layer(model, x + joined, attended)
    beside = _first_layer(model, x, attended) + joined
    if facts.family.attention_residual == "normed":
        for other in (in_turn, beside):
            assert float((added - other).abs().max()) > 1e-2
    else:
        closer = min(in_turn, beside, key=lambda other: float((added - other).abs().max()))
        assert_close(closer, added, atol=1e-10)


def test_a_multiplier_other_than_one_is_among_the_models() -> None:
    assert any("residual_multiplier" in keys for keys in MODELS.values())
    assert "residual_multiplier" not in SIZES
