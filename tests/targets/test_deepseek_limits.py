"""What DeepSeek's class and its servers do not hold, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from convert.targets.deepseek import deepseek_problem
from convert.targets.dense_blocks import BLOCKS
from convert.targets.serving import SERVERS, server_notes, serving_problems
from kvpatch.errors import InputModelError
from tests.families.stock import Checkpoints
from tests.families.tiny import MODELS, family
from tests.helpers import assert_equal, rewrite_tensors
from tests.targets.applying import facts_of
from tests.targets.latent_sources import (
    BIASED,
    SOURCES,
    assert_same,
    save,
    target_of,
    write_latent,
)


@pytest.fixture
def source(tmp_path: Path, name: str) -> Path:
    """A stock model with biases of standard deviation 2."""
    return save(tmp_path / "source", name)


@pytest.mark.parametrize("name", sorted(BIASED))
def test_a_bias_has_no_place_in_a_file_without_biases(
    source: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputModelError, match="of a layer have a bias, for which a file without"):
        write_latent(source, tmp_path / "out", inert="epsilon")
    weights = load_file(source / "model.safetensors")
    rewrite_tensors(source, {n: w * 0 for n, w in weights.items() if n.endswith("bias")})
    assert_same(source, write_latent(source, tmp_path / "zero", inert="epsilon"))


_REASONS = {
    "mistral:window": "sliding windows",
    "mixtral": "the block of mixtral is not",
    "qwen2:window-tied": "sliding windows",
    "qwen3": "normalises queries and keys",
    "gemma2": "soft cap",
    "gemma2:bias-nocap": "the block of gemma2 is not",
    "olmo": "the block of olmo is not",
    "olmo:bias-clip": "clamps queries",
    "phi3:window-partial": "sliding windows",
    "stablelm": "the block of stablelm is not",
    "cohere": "the block of cohere is not",
    "smollm3:bias-window-untied": "sliding windows",
    "glm4": "the block of glm4 is not",
    "ernie4_5:bias-untied": "its MLP has biases",
    "gpt2": "the block of gpt2 is not",
}


@pytest.mark.parametrize("name", _REASONS)
def test_what_the_class_does_not_hold_is_said(checkpoint: Checkpoints, name: str) -> None:
    facts, _ = facts_of(checkpoint(name))
    problem = deepseek_problem(facts, (0, 1))
    assert problem is not None
    assert _REASONS[name] in problem
    assert target_of(facts) is None


def test_every_family_has_a_row_or_a_reason() -> None:
    assert {family(name) for name in SOURCES} == set(BLOCKS)
    assert set(BLOCKS) <= {family(name) for name in MODELS}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"mlp_bias": True}, "its MLP has biases"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of kind 'dynamic'"),
    ],
)
def test_other_obstacles_are_said(tmp_path: Path, keys: Mapping[str, Any], problem: str) -> None:
    facts, _ = facts_of(save(tmp_path / "source", "llama"))
    facts = read_facts({**facts.config, **keys})
    assert problem in (deepseek_problem(facts, (0,)) or "")


def test_a_model_without_positions_needs_a_rotary_pair(tmp_path: Path) -> None:
    facts, _ = facts_of(save(tmp_path / "source", "llama"))
    assert deepseek_problem(facts, (0,)) is None
    assert "no rotary pair" in (deepseek_problem(facts, ()) or "")


@pytest.mark.parametrize("arch", ["deepseek_v3", "youtu"])
@pytest.mark.parametrize("name", ["llama", "smollm3", "qwen2"])
def test_the_config_has_no_key_that_its_class_does_not_know(
    source: Path, name: str, arch: str
) -> None:
    facts, _ = facts_of(source)
    target = target_of(facts, arch=arch)
    assert target is not None
    config = target.edit(read_json(source / "config.json"))
    stock = CONFIG_MAPPING[arch]
    known = {key for parent in stock.__mro__ for key in getattr(parent, "__annotations__", {})}
    legacy = {"rope_theta", "num_nextn_predict_layers"}
    assert config.keys() - legacy <= known | {"model_type", "transformers_version"}
    loaded = stock.from_dict(dict(config))
    before = CONFIG_MAPPING[family(name)].from_dict(read_json(source / "config.json"))
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "initializer_range", "hidden_act"):
        assert getattr(loaded, key) == getattr(before, key)
    assert json.loads(json.dumps(config)) == config


def test_a_tensor_that_the_class_has_no_place_for_is_refused(tmp_path: Path) -> None:
    facts, _ = facts_of(save(tmp_path / "source", "llama"))
    target = target_of(facts)
    assert target is not None
    for name in ("model.layers.0.mlp.gate_proj.bias", "model.extra.weight", "score.weight"):
        with pytest.raises(InputModelError, match=f"'{name}' has no place in a model of class"):
            target.rename(name)


def test_a_layer_without_its_norm_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputModelError, match=r"has no input_layernorm.weight"):
        write_latent(source, tmp_path / "out")


def test_a_checkpoint_without_the_prefix_gives_the_same(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "qwen2:tied")
    first = load_file(write_latent(source, tmp_path / "one") / "model.safetensors")
    weights = load_file(source / "model.safetensors")
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    second = load_file(write_latent(source, tmp_path / "two") / "model.safetensors")
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert_equal(second[name], weight)


def test_layers_that_do_not_fit_are_our_mistake(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    with pytest.raises(ValueError, match="exceed"):
        write_latent(source, tmp_path / "out", rank=39)
    with pytest.raises(ValueError, match="planes"):
        write_latent(source, tmp_path / "out", planes=(0, 1))


def _config(**keys: Any) -> dict[str, Any]:
    """A config.json that all servers load."""
    return {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        **keys,
    }


def test_servers_are_told_apart() -> None:
    assert serving_problems(_config()) == []
    assert serving_problems(_config(kv_lora_rank=256)) == []
    assert serving_problems(_config(kv_lora_rank=448, qk_rope_head_dim=128)) == []
    for keys, words in (
        ({"model_type": "youtu"}, "youtu"),
        ({"attention_bias": True}, "biases"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "YaRN"),
        ({"rms_norm_eps": 1e-5}, "1e-05"),
        ({"tie_word_embeddings": True}, "one tensor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"kv_lora_rank": 128}, "128 + 64"),
    ):
        (problem,) = serving_problems(_config(**keys))
        assert words in problem
        notes = server_notes(_config(**keys))
        assert tuple(notes) == SERVERS
        assert words in notes["vLLM"]
        assert ("serves it as" in notes["SGLang"]) == (keys.keys() == {"kv_lora_rank"})
    assert all("serves it as" in note for note in server_notes(_config()).values())


@pytest.mark.parametrize("name", ["llama:eps", "gemma", "smollm3", "ernie4_5"])
def test_the_form_without_biases_is_the_one_for_servers(
    source: Path, tmp_path: Path, name: str
) -> None:
    biased = read_json(write_latent(source, tmp_path / "one") / "config.json")
    free = read_json(write_latent(source, tmp_path / "two", inert="epsilon") / "config.json")
    assert any("biases" in problem for problem in serving_problems(biased))
    left = " ".join(serving_problems(free))
    for words in ("biases", "rms_norm_eps", "one tensor"):
        assert words not in left
    assert ("gelu" in left) == (name == "gemma")
    assert "YaRN" in left  # the planes of two KV heads, one after the other
