"""One rule for what a checkpoint holds, and the same verdict from every command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from convert.hub import Source
from convert.loading import load_model, quiet_transformers
from convert.opening import open_model
from convert.stock import stock_tensors
from kvpatch.errors import InputModelError
from tests.families.stock import make, random_ids
from tests.families.texts import write_tokenizer
from tests.families.tiny import MODELS, settings
from tests.faults.running import Run, cli
from tests.helpers import assert_equal

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Mapping[str, Tensor]]

METHODS: Mapping[str, list[str]] = {
    "gqa": ["--kv-heads", "2"],
    "cla": ["--share", "2"],
    "mla": ["--rank", "40", "--rope-dims", "8"],
}


def _saved(folder: Path, name: str, change: Change | None = None, **keys: Any) -> Path:
    """A tiny stock model with other tensors, or other keys in its config.json."""
    make(name, settings(name)).save_pretrained(folder)
    if change is not None:
        file = folder / "model.safetensors"
        kept = {n: tensor.clone() for n, tensor in change(load_file(file)).items()}
        save_file(kept, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def _converted(source: Path, out: Path, method: str = "gqa") -> Run:
    return cli([method, str(source), str(out), *METHODS[method]])


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model.eval()(random_ids(model), use_cache=False).logits
    return logits


# --- the tensors of the stock class ---------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_stock_checkpoints_are_read_whole_and_without_a_word(name: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", name)
    with open_model(Source(folder, "")) as model:
        assert (model.left_out, model.renamed, model.warnings) == ((), False, ())
        stored = load_file(folder / "model.safetensors")
        assert model.checkpoint.tensors.keys() == stored.keys()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen2:window-tied", "qwen3"])
def test_what_config_json_says_of_plain_blocks_is_what_the_class_has(
    name: str, tmp_path: Path
) -> None:
    """The truth is a model that transformers builds; transformers is not asked for these."""
    with open_model(Source(_saved(tmp_path / "model", name), "")) as model:
        assert not model.imported
        facts, config = model.facts, model.checkpoint.config
        found = stock_tensors(config, facts, {}, heads=facts.family.heads)
    built = make(name, settings(name)).named_parameters(remove_duplicate=False)
    assert found.shapes == {key: tuple(parameter.shape) for key, parameter in built}
    assert not found.imported


# --- names ----------------------------------------------------------------------------------------


def _prefixed(prefix: str) -> Change:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def _inside(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


_WRAPPED: Mapping[str, Change] = {
    "compiled": _prefixed("_orig_mod."),
    "compiled inside": _inside("layers.1.", "layers.1._orig_mod."),
    "DDP": _prefixed("module."),
    "DDP, compiled": _prefixed("module._orig_mod."),
    "Lightning": _prefixed("model."),
    "vision, old": _prefixed("language_model."),
    "vision, new": _inside("model.", "model.language_model."),
    "peft": _prefixed("base_model.model."),
    "FSDP": _prefixed("_fsdp_wrapped_module."),
    "FSDP inside": _inside("layers.", "layers._fsdp_wrapped_module."),
    "checkpointed": _inside("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "Fabric": _prefixed("_forward_module.module."),
    "adapter removed": _inside("q_proj.weight", "q_proj.base_layer.weight"),
    "base alone": _inside("model.", ""),
    "base in a wrapper": _inside("model.", "language_model."),
}


@pytest.mark.parametrize("case", _WRAPPED)
def test_names_of_wrappers_are_read(case: str, tmp_path: Path) -> None:
    plain, wrapped = (
        _saved(tmp_path / "plain", "llama"),
        _saved(tmp_path / "wrapped", "llama", _WRAPPED[case]),
    )
    assert cli(["inspect", str(wrapped)]).code == 0
    for folder in (plain, wrapped):
        run = _converted(folder, tmp_path / f"{folder.name}-gqa")
        assert run.code == 0, run.err
    assert ("the names of a wrapper" in run.err) == (case != "base alone")
    results = [load_file(tmp_path / f"{n}-gqa" / "model.safetensors") for n in ("plain", "wrapped")]
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert_equal(results[1][name], tensor)
    verified = cli(["verify", str(tmp_path / "wrapped-gqa"), str(wrapped)])
    assert verified.code == 0, verified.out + verified.err
    with quiet_transformers():
        truth = AutoModelForCausalLM.from_pretrained(plain)
        assert_equal(_logits(load_model(wrapped, dtype=None)), _logits(truth))


def _with(**tensors: Tensor) -> Change:
    return lambda own: {**own, **{n.replace("__", "."): t for n, t in tensors.items()}}


_Q = "model.layers.0.self_attn.q_proj."
_FOREIGN: Mapping[str, tuple[Change, str]] = {
    "GPTQ": (lambda own: {**own, _Q + "qweight": torch.ones(2, 2, dtype=torch.int32)}, "GPTQ"),
    "FP8": (lambda own: {**own, _Q + "weight_scale_inv": torch.ones(1)}, "FP8 in blocks"),
    "int8": (
        lambda own: own | {_Q + "weight": own[_Q + "weight"].to(torch.int8)},
        "has dtype torch.int8",
    ),
    "HQQ": (lambda own: {**own, _Q + "W_q": torch.ones(2, 2, dtype=torch.uint8)}, "HQQ"),
    "value": (
        lambda own: {
            **{n: t for n, t in own.items() if n != "lm_head.weight"},
            "v_head.summary.weight": torch.ones(1, 48),
        },
        "this is a reward or value model: it has 'v_head.summary.weight' and no output embedding",
    ),
    "LoRA": (
        lambda own: {**own, _Q + "lora_A.default.weight": torch.ones(2, 48)},
        "an adapter that is not merged",
    ),
    "reward": (
        lambda own: {
            **{n: t for n, t in own.items() if n != "lm_head.weight"},
            "score.weight": torch.ones(1, 48),
        },
        "a sequence classification or reward model",
    ),
    "two decoders": (
        lambda own: {
            **_inside("model.", "language_model.model.")(own),
            **_inside("model.", "module.model.")(own),
        },
        "stored under 'language_model.model.', 'module.model.'",
    ),
    "other code": (
        _inside("self_attn", "attention"),
        "'model.layers.0.self_attn' was expected, found are 'lm_head.weight', 'model.",
    ),
    "unknown prefix": (_prefixed("thinker."), "stored under 'thinker.model.'"),
}


@pytest.mark.parametrize("command", ["inspect", "gqa", "mla", "eval"])
@pytest.mark.parametrize("case", _FOREIGN)
def test_what_cannot_be_read_is_named(case: str, command: str, tmp_path: Path) -> None:
    change, what = _FOREIGN[case]
    source = _saved(tmp_path / "model", "llama", change)
    (tmp_path / "text.txt").write_text("words " * 100)
    run = (
        _converted(source, tmp_path / "out", command)
        if command in METHODS
        else cli(
            [command, str(source), *(["--text", str(tmp_path / "text.txt")] * (command == "eval"))]
        )
    )
    if command == "eval" and "tokenizer" in run.err:  # which is looked for first
        return
    assert run.code == 3, run.err
    assert what in run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.bias"),
        ("codegen", "transformer.h.0.attn.causal_mask"),
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.rotary_emb.cos_cached"),
        ("falcon", "transformer.h.0.self_attention.maybe_rotary.inv_freq"),
        ("mpt", "transformer.blocks.1.attn.attn_bias"),
        ("codegen", "transformer.h.1.attn.embed_positions"),
        ("opt", "model.position_ids"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_buffers_are_left_out_whatever_their_dtype(
    name: str, buffer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    mask = torch.ones(1, 1, 8, 8, dtype=dtype)
    source = _saved(tmp_path / "model", name, lambda own: {**own, buffer: mask})
    run = _converted(source, tmp_path / "out")
    assert run.code == 0, run.err
    assert buffer not in run.err
    assert not any(
        "mask" in n or n.endswith("attn.bias")
        for n in load_file(tmp_path / "out" / "model.safetensors")
    )
    verified = cli(["verify", str(tmp_path / "out"), str(source)])
    assert verified.code == 0, verified.out


# --- what the class does not read -----------------------------------------------------------------

_EXTRAS: Mapping[str, tuple[Change, dict[str, Any]]] = {
    "further tokens": (
        _with(
            mtp__fc__weight=torch.ones(4, 8),
            mtp__layers__0__self_attn__k_proj__weight=torch.ones(4, 4),
        ),
        {"num_nextn_predict_layers": 1},
    ),
    "further layer": (
        lambda own: {
            **own,
            **{n.replace("layers.1", "layers.2"): t for n, t in own.items() if "layers.1" in n},
        },
        {"num_nextn_predict_layers": 1},
    ),
    "value head": (_with(v_head__summary__weight=torch.ones(1, 48)), {}),
    "biases": (
        lambda own: {
            **own,
            **{f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(80) for i in (0, 1)},
        },
        {},
    ),
    "stale copy": (
        lambda own: {**own, "module.model.norm.weight": own["model.norm.weight"]},
        {},
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", _EXTRAS)
def test_what_the_class_does_not_read_is_left_out(case: str, method: str, tmp_path: Path) -> None:
    change, keys = _EXTRAS[case]
    plain = _saved(tmp_path / "plain", "llama")
    source = _saved(tmp_path / "model", "llama", change, **keys)
    inspected = cli(["inspect", str(source)])
    assert inspected.code == 0
    assert "LlamaForCausalLM does not read" in inspected.err
    for folder in (plain, source):
        run = _converted(folder, tmp_path / f"{folder.name}-out", method)
        assert run.code == 0, run.err
    assert "left out, as in transformers" in run.err
    one, other = (
        load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("plain", "model")
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_equal(other[name], tensor)
    verified = cli(["verify", str(tmp_path / "model-out"), str(source)])
    assert verified.code == 0, verified.out
    with quiet_transformers():
        truth = AutoModelForCausalLM.from_pretrained(source)
        assert_equal(_logits(load_model(source, dtype=None)), _logits(truth))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "keys", "row"),
    [
        (None, {"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight"),
        (None, {"num_hidden_layers": 1}, "no layer 1"),
        (None, {"intermediate_size": 41}, "mlp.gate_proj.weight: config says (41, 48)"),
        (lambda own: own | {"lm_head.weight": torch.ones(101, 48)}, {}, "lm_head.weight: config"),
        (
            lambda own: {n: t for n, t in own.items() if n != "model.norm.weight"},
            {},
            "model.norm.weight: config says (48,), file has None",
        ),
    ],
    ids=["more layers", "fewer layers", "MLP", "head", "norm"],
)
def test_contradictions_have_one_verdict(
    change: Change | None, keys: dict[str, Any], row: str, method: str, tmp_path: Path
) -> None:
    source = _saved(tmp_path / "model", "llama", change, **keys)
    runs = [cli(["inspect", str(source)]), _converted(source, tmp_path / "out", method)]
    assert [run.code for run in runs] == [3, 3]
    assert row in runs[0].err
    assert runs[0].err == runs[1].err
    with quiet_transformers(), pytest.raises(InputModelError) as caught:
        load_model(source, dtype=None)
    assert row in caught.value.message


@pytest.mark.parametrize("command", ["inspect", "gqa", "eval"])
@pytest.mark.parametrize(
    ("name", "change", "keys", "what"),
    [
        (
            "mixtral",
            lambda own: own | {n.replace("experts.2.", "experts.3."): t for n, t in own.items()},
            {},
            "experts.3.w1.weight: config says no such expert, file has (40, 48)",
        ),
        ("mixtral", None, {"num_experts_per_tok": 4}, "num_experts_per_tok is 4, of 3 experts"),
        ("llama", None, {"pad_token_id": 97}, "Padding_idx must be within num_embeddings"),
        ("llama", None, {"hidden_act": "sillu"}, "does not build a model of it: KeyError: 'sillu'"),
    ],
    ids=["one expert more", "experts per token", "padding", "activation"],
)
def test_what_transformers_does_not_load_or_run_is_refused(
    name: str, change: Change | None, keys: dict[str, Any], what: str, command: str, tmp_path: Path
) -> None:
    source = _saved(tmp_path / "model", name, change, **keys)
    write_tokenizer(source)
    (tmp_path / "text.txt").write_text("words" * 100)
    run = (
        _converted(source, tmp_path / "out", command)
        if command in METHODS
        else cli(
            [command, str(source), *(["--text", str(tmp_path / "text.txt")] * (command == "eval"))]
        )
    )
    assert run.code == 3, run.err
    assert what in run.err


def test_other_activations_are_taken(tmp_path: Path) -> None:
    source = _saved(tmp_path / "model", "llama", hidden_act="gelu_fast")
    assert _converted(source, tmp_path / "out").code == 0


# --- tied embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gqa", "mla", "cla"])
@pytest.mark.parametrize("same", [True, False])
def test_two_stored_embeddings_are_tied_if_they_are_equal(
    same: bool, method: str, tmp_path: Path
) -> None:
    def headed(own: Tensors) -> Tensors:
        embedding = own["model.embed_tokens.weight"]
        return {**own, "lm_head.weight": embedding.clone() if same else embedding.flip(0)}

    source = _saved(tmp_path / "model", "llama:bias-tied", headed)
    run = _converted(source, tmp_path / "out", method)
    assert run.code == 0, run.err
    assert ("differs from the embedding" in run.err) != same
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if method != "mla":  # whose class is written untied either way
        assert config["tie_word_embeddings"] is same
    with quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained(source)
        head = load_model(tmp_path / "out", dtype=None).lm_head.weight.detach()
    assert_equal(head, stock.lm_head.weight.detach())
    verified = cli(["verify", str(tmp_path / "out"), str(source)])
    assert verified.code == 0, verified.out


def test_an_output_embedding_alone_serves_as_both(tmp_path: Path) -> None:
    def moved(own: Tensors) -> Tensors:
        return {"lm_head.weight": own.pop("model.embed_tokens.weight"), **own}

    source = _saved(tmp_path / "model", "llama:bias-tied", moved)
    assert _converted(source, tmp_path / "out").code == 0
    with quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained(source)
        result = load_model(tmp_path / "out", dtype=None)
    assert_equal(
        result.model.embed_tokens.weight.detach(), stock.model.embed_tokens.weight.detach()
    )


# --- indices --------------------------------------------------------------------------------------


def _sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    make("llama", settings("llama")).save_pretrained(folder, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder, index["weight_map"]


@pytest.mark.parametrize("command", ["inspect", "gqa", "mla"])
def test_a_gguf_file_alone_is_named(command: str, tmp_path: Path) -> None:
    source = _saved(tmp_path / "model", "llama")
    (source / "model.safetensors").rename(source / "model-q8_0.gguf")
    out = [] if command == "inspect" else [str(tmp_path / "out"), *METHODS[command]]
    run = cli([command, str(source), *out])
    assert run.code == 3
    assert "in a GGUF file (model-q8_0.gguf)" in run.err


@pytest.mark.parametrize("lost", [True, False])
def test_an_index_is_made_anew_by_the_command_that_the_hint_names(
    lost: bool, tmp_path: Path
) -> None:
    folder, weight_map = _sharded(tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    if lost:
        index.unlink()
    else:
        dangling = {**weight_map, "mtp.fc.weight": next(iter(weight_map.values()))}
        index.write_text(json.dumps({"metadata": {}, "weight_map": dangling}))
    refused = _converted(folder, tmp_path / "out")
    assert refused.code == 3
    command = refused.err.rpartition("kvpatch ")[2].split()
    assert cli(command).code == 0
    assert json.loads(index.read_text())["weight_map"] == weight_map
    assert _converted(folder, tmp_path / "out").code == 0


def test_tensors_that_the_index_does_not_name_are_read_as_transformers_does(
    tmp_path: Path,
) -> None:
    folder, weight_map = _sharded(tmp_path / "model")
    named = {name: file for name, file in weight_map.items() if "norm" not in name}
    assert set(named.values()) == set(weight_map.values())
    index = {"metadata": {}, "weight_map": named}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run = _converted(folder, tmp_path / "out")
    assert run.code == 0, run.err
    assert "does not name 5 tensors that are in its shards" in run.err
    with quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained(folder)
        assert_equal(_logits(load_model(folder, dtype=None)), _logits(stock))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_equal(found["model.norm.weight"], stock.model.norm.weight.detach())


@pytest.mark.parametrize("command", ["inspect", "gqa"])
def test_a_tensor_in_two_shards_is_refused(command: str, tmp_path: Path) -> None:
    folder, weight_map = _sharded(tmp_path / "model")
    first, second = sorted(set(weight_map.values()))[:2]
    twice = next(name for name, file in weight_map.items() if file == first)
    tensors = load_file(folder / second) | {twice: load_file(folder / first)[twice] * 2}
    save_file(tensors, folder / second, metadata={"format": "pt"})
    out = tmp_path / "out"
    run = cli([command, str(folder)]) if command == "inspect" else _converted(folder, out)
    assert run.code == 3
    assert f"{first} and {second} both hold {twice!r}" in run.err


def test_pickled_shards_without_an_index_are_named(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", "llama")
    shard = "pytorch_model-00001-of-00001.bin"
    torch.save(load_file(folder / "model.safetensors"), folder / shard)
    (folder / "model.safetensors").unlink()
    for run in (
        cli(["inspect", str(folder)]),
        cli(["mqa", str(folder), str(tmp_path / "out"), "--allow-pickle"]),
    ):
        assert f"has pickled shards ({shard}, ...) but no pytorch_model.bin.index.json" in run.err


def test_an_index_without_metadata_is_read_by_all(tmp_path: Path) -> None:
    """transformers alone refuses it, for a key that says nothing of the tensors."""
    folder, weight_map = _sharded(tmp_path / "model")
    truth = make("llama", settings("llama"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert _converted(folder, tmp_path / "out").code == 0
    with quiet_transformers():
        assert_equal(_logits(load_model(folder, dtype=None)), _logits(truth))


def test_an_index_of_missing_shards_is_not_made(tmp_path: Path) -> None:
    folder, weight_map = _sharded(tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    lost = sorted(set(weight_map.values()))[1]
    (folder / lost).unlink()
    run = cli(["reindex", str(folder)])
    assert (run.code, run.out) == (3, "")
    assert lost in run.err
    assert not (folder / "model.safetensors.index.json").exists()
