"""What read_facts and check_shapes refuse of the families in the table, and what they let pass."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from convert.facts import check_shapes, read_facts
from convert.families import tensor_names
from convert.families.naming import canonical_names
from kvpatch.errors import InputModelError
from tests.families.tiny import GROUPED, MODELS, family, settings


@pytest.mark.parametrize(
    ("model_type", "keys", "why"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True: cross-attention"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False: a norm after"),
        ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim is 24: a projection between"),
        ("falcon", {"alibi": False}, "alibi is False: a Falcon with RoPE"),
        ("falcon", {"parallel_attn": True}, "parallel_attn is True: attention beside"),
        ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture is True: the"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi is False: an MPT with"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm is True: a prefix"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln is True: a norm"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "is True: a residual"),
        ("mistral", {"sliding_window": 1}, "sliding_window is 1, with which the classes of"),
        ("gptj", {"rotary_dim": None}, "rotary_dim must be even and between 2 and"),
        ("gptj", {"rotary_dim": 7}, "rotary_dim must be even and between 2 and"),
        ("codegen", {"rotary_dim": 14}, "the width of a head, 12; found 14"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "must describe 2 layers"),
        ("gpt_neo", {"attention_types": 3}, "must describe 2 layers, found 3"),
        ("gpt_neo", {"attention_types": [[["global"], "2"]]}, "must describe 2 layers"),
        ("gpt_neo", {"attention_layers": ["global"]}, "must describe 2 layers"),
        ("gpt2", {"n_head": 0, "num_attention_heads": None}, "n_head must be a positive integer"),
        ("bloom", {"n_embed": "x"}, "n_embed must be a positive integer, found 'x'"),
        ("mpt", {"attn_config": {"softmax_scale": "a"}}, "attn_config.softmax_scale must be a"),
        ("gpt_neox", {"rotary_pct": "a"}, "rotary_pct must be a number above 0"),
        ("granite", {"residual_multiplier": "a"}, "residual_multiplier must be a number"),
    ],
)
def test_forms_that_are_not_supported_are_refused_by_name(
    model_type: str, keys: dict[str, Any], why: str
) -> None:
    sound = {"model_type": model_type, **settings(model_type)}
    read_facts(sound)
    with pytest.raises(InputModelError, match=re.escape(why)):
        read_facts(sound | keys)


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "opt", "gpt_neox", "llama"])
def test_names_may_lack_the_prefix_of_the_base_model(model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings(model_type)))
    facts = read_facts(model.config.to_dict())
    whole, base = (
        {name: tuple(tensor.shape) for name, tensor in m.state_dict().items()}
        for m in (model, model.base_model)
    )
    if not facts.tied:
        base |= {name: shape for name, shape in whole.items() if name in facts.family.heads}
    assert canonical_names(whole, facts.family) == {name: name for name in whole}
    named = canonical_names(base, facts.family)
    assert {named[name]: shape for name, shape in base.items()}.items() <= whole.items()
    check_shapes(facts, whole)
    check_shapes(facts, {named[name]: shape for name, shape in base.items()})
    with pytest.raises(InputModelError, match=r"config\.json contradicts the tensors"):
        check_shapes(facts, base)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in GROUPED])
def test_headers_that_contradict_the_config_are_named(name: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family(name)](**settings(name)))
    facts = read_facts(model.config.to_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    check_shapes(facts, shapes)
    embedding = facts.family.embedding
    for key in (*tensor_names(facts.family, facts.geometry, 1, "qkvo"), embedding):
        if key in shapes:
            with pytest.raises(InputModelError, match=re.escape(f"{key}: config says")):
                check_shapes(facts, shapes | {key: (5, *shapes[key][1:])})


def test_a_class_of_results_alone_is_read_with_its_single_head() -> None:
    sizes = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 97}
    config = {"model_type": "gpt_bigcode", **sizes}
    assert read_facts(config).geometry.kv_heads == 1
    with pytest.raises(InputModelError, match="multi_query is False: a GPT-BigCode with as many"):
        read_facts(config | {"multi_query": False})
