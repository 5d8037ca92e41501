"""Keys of config.json that say how a model was run: they change nothing that kvpatch does.

The truth is the same checkpoint without the key.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from convert import convert, make_recipe
from convert.config_keys import SETTINGS, To, result_config, running_config
from kvpatch.errors import InputModelError
from tests.families.stock import full_logits, load, make, random_ids
from tests.families.texts import random_text, write_tokenizer
from tests.families.tiny import MODELS, family, settings
from tests.faults.running import cli
from tests.training.small import FLAGS, weights

# a value of every key that some program has written, as harmful as it can be
LEFT_OVER: Mapping[str, Any] = {
    **dict.fromkeys(("_attn_implementation", "attn_implementation"), "flash_attention_2"),
    "_attn_implementation_internal": "flash_attention_2",
    **dict.fromkeys(("_experts_implementation", "experts_implementation"), "grouped_mm"),
    "_experts_implementation_internal": "grouped_mm",
    **dict.fromkeys(("_attn_implementation_autoset", "_flash_attn_2_enabled"), True),
    **dict.fromkeys(("use_flash_attention_2", "use_flash_attn"), True),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), True),
    **dict.fromkeys(("return_dict", "use_return_dict", "tie_last_hidden_states"), False),
    "torchscript": True,
    "cache_implementation": 3,
    "use_cache": False,
    "chunk_size_feed_forward": 3,
    **dict.fromkeys(("gradient_checkpointing", "use_bfloat16"), True),
    **dict.fromkeys(("activation_dropout", "attention_dropout", "attn_pdrop", "dropout"), 0.3),
    **dict.fromkeys(("emb_pdrop", "embd_pdrop", "embed_dropout", "embedding_dropout"), 0.3),
    **dict.fromkeys(("hidden_dropout", "layerdrop", "resid_dropout", "resid_pdrop"), 0.3),
    **dict.fromkeys(("residual_dropout", "router_jitter_noise"), 0.3),
    "pretraining_tp": 2,
    **dict.fromkeys(("add_cross_attention", "is_decoder", "is_encoder_decoder"), True),
    "cross_attention_hidden_size": 8,
    "tie_encoder_decoder": True,
    "finetuning_task": "cola",
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "loss_type": "ForSequenceClassification",
    "num_labels": 1,
    "problem_type": "single_label_classification",  # transformers refuses it with one label
    "_commit_hash": "0" * 40,
    **dict.fromkeys(("_name_or_path", "name_or_path"), "/home/somebody/model"),
    "unsloth_fixed": True,
    "unsloth_version": "2024.9",
    "auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"},
    "attribute_map": {"hidden_size": "width"},
    **{f"base_model_{kind}_plan": {"layers.*": "colwise"} for kind in ("ep", "pp", "tp")},
    "base_model_fsdp_plan": {"layers.*": "free_full_weight"},
    "configuration_files": ["config.4.0.0.json"],
    "distributed_config": {"tp_size": 2},
    "fusion_config": {"patch_embeddings": True},
    "transformers_weights": "other.safetensors",
    "decoder": {"model_type": "llama", "hidden_size": 8},
    "generator": {"model_type": "llama", "hidden_size": 8},
    "text_config": {"model_type": "llama", "hidden_size": 8},
    "text_encoder": {"model_type": "bert", "hidden_size": 8},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 8},
    "pruned_heads": {},
    "quantization_config": {},
    **dict.fromkeys(("attention_chunk_size", "sliding_window"), 4),
    "num_nextn_predict_layers": 1,
    **dict.fromkeys(("do_sample", "early_stopping"), True),
    **dict.fromkeys(("max_length", "min_length", "num_beams", "top_k"), 4),
    "no_repeat_ngram_size": 2,
    **dict.fromkeys(("length_penalty", "repetition_penalty", "temperature", "top_p"), 0.7),
    "transformers_version": "4.31.0",
}
_KEYS = [(key, setting) for setting in SETTINGS for key in setting.keys]
_OF = dict(_KEYS)


def test_every_key_stands_in_one_row_and_is_tested() -> None:
    keys = [key for key, _ in _KEYS]
    assert sorted(keys) == sorted(LEFT_OVER)


@pytest.mark.parametrize("key", LEFT_OVER)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mpt"])
def test_models_run_as_without_the_key(name: str, key: str) -> None:
    if _OF[key].windowless and name == "mixtral":
        pytest.skip("its attention has windows")
    plain = make(name, settings(name)).config.to_dict()
    plain.pop(key, None)
    with_key, without = (running_config({**plain, **more}) for more in ({key: LEFT_OVER[key]}, {}))
    found, expected = vars(with_key), vars(without)
    assert str(found.pop("attn_config", None)) == str(expected.pop("attn_config", None))
    # a key that the class does not have stays, but nothing reads it
    read = {n: v for n, v in found.items() if n != "transformers_version" and n in expected}
    assert read == {n: v for n, v in expected.items() if n != "transformers_version"}
    assert set(found) - set(expected) <= {key}


@pytest.mark.parametrize("name", MODELS)
def test_models_run_without_noise(name: str) -> None:
    config = make(name, settings(name)).config.to_dict()
    noise = dict.fromkeys(_dropouts(CONFIG_MAPPING[family(name)]()), 0.3)
    own = running_config({**config, **noise})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(own).train()
    ids = random_ids(model)
    with torch.no_grad():
        first, second = (model(ids).logits for _ in range(2))
    assert torch.equal(first, second)


def _dropouts(config: Any) -> list[str]:
    """Keys of a class whose names say that they are dropout, and noise of its routers."""
    words = ("drop", "jitter")
    return [key for key in vars(config) if any(word in key for word in words)]


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes_is_kept(name: str, tmp_path: Path) -> None:
    make(name, settings(name)).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("_name_or_path", None)
    result = result_config(config)
    absent = set(config) - set(result)
    assert {key: config[key] for key in absent} == dict.fromkeys(absent, False)
    config["use_cache"] = True  # which the class of MPT has not
    assert result == {key: config[key] for key in result}


@pytest.mark.parametrize(("key", "setting"), _KEYS)
def test_results_have_what_the_table_says(key: str, setting: Any) -> None:
    value = LEFT_OVER[key]
    found = result_config({"model_type": "llama", key: value, "last": 2})
    fate = setting.result
    middle = {} if fate == "dropped" else {key: fate.value if isinstance(fate, To) else value}
    assert list(found.items()) == list({"model_type": "llama", **middle, "last": 2}.items())
    if setting.windowless:
        assert result_config({"model_type": "mistral", key: value})[key] == value
    if setting.empty:
        assert result_config({key: {"a": 1}}) == {key: {"a": 1}}


@pytest.mark.parametrize(
    ("key", "value"), [("pruned_heads", {"0": [1]}), ("is_causal", False)], ids=str
)
def test_what_makes_another_model_is_refused(key: str, value: object, tmp_path: Path) -> None:
    make("llama", settings("llama")).save_pretrained(tmp_path / "source")
    _add(tmp_path / "source", {key: value})
    recipe = make_recipe({"method": "mqa", "source": str(tmp_path / "source"), "output": "out"})
    with pytest.raises(InputModelError, match=f"config.json has {key} "):
        convert(recipe)


def _add(folder: Path, keys: Mapping[str, object]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


_KINDS: Mapping[str, dict[str, Any]] = {
    "gqa": {"method": "gqa", "kv_heads": 2, "merge": "svd", "samples": 4, "context": 16},
    "cla": {"method": "cla", "share": 2},
    "mla": {"method": "mla", "kv_budget": "16+4", "rope_select": "stride"},
    "mla-kvpatch": {"method": "mla", "kv_budget": "16+4", "target": "kvpatch"},
}
Made = Callable[[int | None, str], Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("settings")
    (root / "train.txt").write_text(random_text(400, seed=3))
    make("llama", {**settings("llama"), "head_dim": 12}).save_pretrained(root / "source")
    write_tokenizer(root / "source")
    return root


@pytest.fixture(scope="module")
def made(place: Path) -> Made:
    """A conversion, or with kind ``source`` what it is made from, with the keys of a row if any."""

    @cache
    def folder(row: int | None, kind: str) -> Path:
        if kind != "source":
            out = place / f"{row}-{kind}"
            text = {"calibration": str(place / "train.txt")} if kind == "gqa" else {}
            places = {"source": str(folder(row, "source")), "output": str(out)}
            return convert(make_recipe({**_KINDS[kind], **text, **places}))
        if row is None:
            return place / "source"
        changed = place / f"{row}-source"
        shutil.copytree(place / "source", changed)
        _add(changed, {key: LEFT_OVER[key] for key in SETTINGS[row].keys})
        return changed

    return folder


_each_row = pytest.mark.parametrize("row", range(len(SETTINGS)), ids=lambda n: SETTINGS[n].keys[0])


@pytest.mark.parametrize("kind", _KINDS)
@_each_row
def test_conversions_are_those_without_the_keys(made: Made, kind: str, row: int) -> None:
    ours, plain = made(row, kind), made(None, kind)
    assert _bytes(ours) == _bytes(plain)
    found, expected = load(ours), load(plain)
    ids = random_ids(expected)
    assert torch.equal(full_logits(found, ids), full_logits(expected, ids))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@_each_row
def test_results_are_checked_measured_and_trained_as_without_the_keys(
    made: Made, place: Path, row: int, tmp_path: Path
) -> None:
    text = str(place / "train.txt")
    measured, trained = [], []
    for name, which in (("ours", row), ("plain", None)):
        source, result = made(which, "source"), made(which, "gqa")
        assert "failed" not in _run("verify", result, source)
        flags = ("--context", "16", "--samples", "2", "--json")
        measured.append(_run("eval", result, "--text", text, "--against", source, *flags))
        _run(
            *("uptrain", result, tmp_path / name, "--data", text, "--teacher", source),
            *(*FLAGS, "--tokens", "64"),
        )
        trained.append(weights(tmp_path / name))
    assert measured[0] == measured[1]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def _run(*arguments: object) -> str:
    run = cli([str(argument) for argument in arguments])
    assert run.code == 0, run.err
    return run.out
