"""Drawn settings of RoPE and windows: refused, or read as the stock configuration reads them."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from convert.facts import ModelFacts, read_facts
from convert.families import FAMILIES
from convert.loading import quiet_transformers
from kvpatch.errors import InputModelError
from tests.families.tiny import MODELS, family, settings
from tests.fuzz.values import FOREIGN, ROPES, near

_KEYS = (
    *("rope_theta", "partial_rotary_factor", "rotary_pct", "rope_local_base_freq", "head_dim"),
    *("no_rope_layers", "no_rope_layer_interval", "rotary_dim", "sliding_window", "layer_types"),
    *("sliding_window_pattern", "use_sliding_window", "max_window_layers", "window_size"),
)


def _drawn(random: Random) -> dict[str, Any]:
    name = random.choice(tuple(MODELS))
    saved = CONFIG_MAPPING[family(name)](**settings(name)).to_dict()
    config = {**saved, "model_type": family(name), "dtype": "float32"}
    if random.random() < 0.7:  # as older transformers saved it
        config = {k: v for k, v in config.items() if k not in {"rope_parameters", "layer_types"}}
    for _ in range(random.choice((1, 1, 2))):
        if random.random() < 0.5:
            key = random.choice(("rope_scaling", "rope_parameters"))
            value = copy.deepcopy(random.choice(ROPES))
            config[key] = value if random.random() < 0.8 else near(value, random)
        else:
            key = random.choice(_KEYS)
            config[key] = random.choice(FOREIGN[key])
    return config


def _both(config: dict[str, Any]) -> tuple[ModelFacts, Any] | None:
    """The facts and the stock configuration; None where one of the two is refused."""
    try:
        facts = read_facts(copy.deepcopy(config))
        return facts, CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    except InputModelError:
        return None
    except Exception:  # what transformers raises is no concern of this test
        return None


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_is_what_the_stock_class_computes(seed: int) -> None:
    random, compared = Random(seed), 0
    with quiet_transformers():
        for _ in range(400):
            config = _drawn(random)
            both = _both(config)
            if both is not None:
                compared += 1
                _assert_equal_positions(config, *both)
    assert compared > 100


def _assert_equal_positions(config: dict[str, Any], facts: ModelFacts, stock: Any) -> None:
    row = FAMILIES[config["model_type"]]
    types = getattr(stock, "layer_types", None) or ["full_attention"] * facts.layers
    window = getattr(stock, "sliding_window", None)
    rotates = getattr(stock, "no_rope_layers", None) or [1] * facts.layers
    for layer, rope in enumerate(facts.ropes):
        if row.windows.rule in {"pattern", "from_layer", "nope"}:
            slides = types[layer] == "sliding_attention"
            assert facts.windows[layer] == (window if slides else None), config
        elif row.windows.rule == "all":
            assert facts.windows[layer] == window, config
        if row.positions != "rope" or row.rotary_dim is not None:
            continue
        if row.nope_every and not rotates[layer]:
            assert rope.dim == 0, config
            continue
        tables = stock.rope_parameters
        table = tables[types[layer]] if row.local_theta is not None else tables
        assert (rope.kind, rope.theta) == (table["rope_type"], table["rope_theta"]), config
        head = getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
        share = 1.0 if row.partial is None else table.get("partial_rotary_factor", row.partial)
        assert rope.dim == int(head * share), config
