"""Types and ranges of config values, held against the configuration classes of transformers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

import pytest
import torch
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from convert.facts import read_facts
from convert.families import FAMILIES
from convert.families.positions import check_positions
from convert.families.values import VALUES, check_values
from kvpatch.errors import InputModelError
from tests.families.tiny import MODELS, family, settings

# read with rules of their own, or by nothing that loads or runs a model
_ELSEWHERE = {
    *("attention_types", "rotary_dim", "dtype"),  # facts and positions
    *("per_layer_config", "mtp_layer_types", "mlp_layer_types"),
    *("chunk_size_feed_forward", "is_decoder", "output_attentions", "output_hidden_states"),
    *("problem_type", "return_dict", "classifier_dropout", "_remove_final_layer_norm"),
    "router_aux_loss_coef",
}
# null here is refused by facts, unless the size stands under its other name
_SIZES = {
    *("hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head", "n_heads", "num_heads"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
}
_SAMPLES = (None, True, False, 0, 3, -1, 10**30, 0.0, 0.5, -0.5, 2.5, "x", [1], ["x"], [None], {})


def _fields(model_type: str) -> dict[str, Any]:
    config = CONFIG_MAPPING[model_type]
    hints = get_type_hints(config, localns={"torch": torch})
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _accepts(model_type: str, key: str, value: object) -> bool:
    try:
        check_values({key: value}, FAMILIES[model_type])
        return True
    except InputModelError:
        return False


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_accepted_is_what_transformers_accepts(model_type: str) -> None:
    for key, expected in _fields(model_type).items():
        for value in _SAMPLES:
            refused_later = value is None and key in _SIZES
            if key in VALUES and not refused_later and _accepts(model_type, key, value):
                try:
                    type_validator(key, value, expected)
                except (TypeError, StrictDataclassFieldValidationError) as error:
                    raise AssertionError(f"{key} = {value!r} is accepted") from error


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_a_class_has_a_rule(model_type: str) -> None:
    assert not _fields(model_type).keys() - VALUES.keys() - _ELSEWHERE


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_of_a_class_are_accepted(model_type: str) -> None:
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    for key in VALUES.keys() & defaults.keys():
        assert _accepts(model_type, key, defaults[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_accepted(name: str) -> None:
    saved = CONFIG_MAPPING[family(name)](**settings(name)).to_dict()
    check_values({"model_type": family(name), **saved}, FAMILIES[family(name)])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1, -1e-5, "1e-5", None])
def test_numbers_are_finite_and_in_range(value: object) -> None:
    with pytest.raises(InputModelError, match=r"config\.json: rms_norm_eps must be a number of 0"):
        check_values({"rms_norm_eps": value}, FAMILIES["llama"])


@pytest.mark.parametrize("kind", ["default", *ROPE_INIT_FUNCTIONS])
def test_every_kind_of_rope_is_known(kind: str) -> None:
    table = {
        "rope_type": kind,
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
    }
    check_positions({"rope_scaling": table}, FAMILIES["llama"], 2)


_LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("model_type", "keys", "why"),
    [
        ("llama", {"rope_scaling": {"rope_type": "ntk"}}, "rope_type of a llama model must be one"),
        ("llama", {"rope_scaling": {"type": ["linear"]}}, "type of a llama model must be one of"),
        ("phi3", {"rope_scaling": _LINEAR}, "must be one of default, longrope, su, yarn, found"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "type 'linear' has no factor"),
        ("llama", {"rope_scaling": {**_LINEAR, "factor": "2"}}, "factor must be a positive number"),
        ("llama", {"rope_parameters": {"rope_theta": math.nan}}, "rope_theta must be a positive"),
        ("llama", {"rope_parameters": {"full_attention": _LINEAR}}, "must be one table"),
        ("gemma3_text", {"rope_parameters": _LINEAR}, "must be an entry for full_attention"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "must be an object, found 3"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "short_factor of the RoPE parameters must have 10 numbers",
        ),
        ("llama", {"head_dim": 11}, "11 of the 11 dims of a head would rotate"),
        ("phi", {"partial_rotary_factor": 0.3}, "3 of the 12 dims of a head would rotate"),
        ("phi", {"partial_rotary_factor": 1.7}, "must be a number above 0 and up to 1"),
        (
            "llama",
            {"rope_scaling": {**_LINEAR, "partial_rotary_factor": 0.5}},
            "and all of a llama model",
        ),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "must list 2 layers"),
        ("gemma2", {"layer_types": ["full_attention", "x"]}, "must list 2 layers"),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 2, "sliding_window": 4},
            "which is what its class computes",
        ),
        ("mistral", {"sliding_window": 0}, "have a sliding window, but sliding_window is 0"),
        ("gemma2", {"sliding_window": None}, "sliding_window is None"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must list 4 layers"),
        ("gpt2", {"n_embd": 50, "hidden_size": None}, "4 heads do not divide the hidden size 50"),
        ("codegen", {"num_attention_heads": 6}, "6 heads do not fill the 4 blocks"),
        ("llama", {"num_hidden_layers": 10**5}, "larger than any model"),
        ("llama", {"kv_source_layers": [0, 0]}, "has kv_source_layers, which a llama model"),
        ("kvpatch_llama", {"kv_source_layers": [0, 2]}, "must list 2 layers"),
        ("kvpatch_llama", {"kv_source_layers": [1, 1]}, "must list 2 layers"),
    ],
)
def test_what_contradicts_itself_is_refused(
    model_type: str, keys: dict[str, Any], why: str
) -> None:
    sound = {"model_type": model_type, **settings(model_type.removeprefix("kvpatch_"))}
    read_facts(sound)
    with pytest.raises(InputModelError, match=why):
        read_facts(sound | keys)
