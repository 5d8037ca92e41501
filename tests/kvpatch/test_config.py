"""The config of converted models: what it says, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from kvpatch.errors import UsageError
from kvpatch.models import FAMILIES, auto_map, class_names, family_of
from kvpatch.models.configuration_kvpatch import config_class
from kvpatch.models.modeling_kvpatch import causal_lm_class
from tests.families import tiny


def _config(model_type: str = "llama", **settings: Any) -> Any:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    return config_class(FAMILIES[model_type])(**sizes | settings)


@pytest.mark.parametrize(
    ("sources", "modes"),
    [
        (None, None),
        ([0, 1, 2, 3], [None, None, None, None]),
        ([0, 0, 2, 2], ["store", "reuse", "store", "reuse"]),
        ([0, 1, 1, 0], ["store", "store", "reuse", "reuse"]),
        ([0, 0, 0, 3], ["store", "reuse", "reuse", None]),
    ],
)
def test_modes_are_those_of_the_cache_protocol(
    sources: list[int] | None, modes: list[str | None] | None
) -> None:
    assert _config(kv_source_layers=sources).kv_sharing_modes == modes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_source_layers": [0, 0, 2]}, "has 3 entries, but there are 4 layers"),
        ({"kv_source_layers": [0, 2, 2, 2]}, "layer 1 cannot read .* layer 2"),
        ({"kv_source_layers": [1, 1, 2, 3]}, "layer 0 cannot read .* layer 1"),
        ({"kv_source_layers": [0, -1, 2, 3]}, "layer 1 cannot read .* layer -1"),
        ({"kv_source_layers": [0, "0", 2, 3]}, "layer 1 cannot read .* layer '0'"),
        ({"kv_source_layers": [0, 0, 1, 3]}, "layer 2 reads layer 1, which has no keys"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, which does not divide"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**settings)


_MIXED = ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        (
            "gemma2",
            {"layer_types": _MIXED},
            "layer_types differ .'sliding_attention' and 'full_attention'.",
        ),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}, "no_rope_layers differ"),
        ("opt", {"layerdrop": 0.1}, "layerdrop is 0.1"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_layers_of_different_kinds_do_not_share(
    model_type: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _config(model_type, **settings, kv_source_layers=[0, 0, 2, 3])


def test_what_was_set_later_is_checked_by_the_model() -> None:
    config = _config(**tiny.SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 4})
    config.kv_source_layers = [1, 1]
    with pytest.raises(ValueError, match="layer 0 cannot read"):
        causal_lm_class(FAMILIES["llama"])(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_kv_heads_mean_all_heads(model_type: str) -> None:
    if not FAMILIES[model_type].native_gqa:
        config = config_class(FAMILIES[model_type])(num_attention_heads=4, hidden_size=32)
        assert config.num_key_value_heads == 4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_native_gqa_is_what_the_stock_config_has(model_type: str) -> None:
    family = FAMILIES[model_type]
    stock = config_class(family).__bases__[-1]
    assert family.native_gqa == ("num_key_value_heads" in stock.__dataclass_fields__)
    assert stock.model_type == model_type


def test_names_for_config_json() -> None:
    assert auto_map("gpt_neox") == auto_map("kvpatch_gpt_neox")
    assert auto_map("llama") == {
        "AutoConfig": "configuration_kvpatch.KvpatchLlamaConfig",
        "AutoModel": "modeling_kvpatch.KvpatchLlamaModel",
        "AutoModelForCausalLM": "modeling_kvpatch.KvpatchLlamaForCausalLM",
    }
    assert class_names("gpt2")["AutoModelForCausalLM"] == "KvpatchGPT2ForCausalLM"
    assert family_of("opt").attention_prefix == "model.decoder.layers.{layer}.self_attn."
    assert family_of("gpt_neo").attention_prefix == "transformer.h.{layer}.attn.attention."


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UsageError, match="'mamba'") as raised:
        family_of("mamba")
    assert "llama" in str(raised.value.hint)
