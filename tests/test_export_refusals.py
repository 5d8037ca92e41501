"""What ``kvpatch export`` refuses: by name, with the right exit code, and nothing written."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from convert.checkpoint.reader import read_json
from tests.faults.running import cli, contents
from tests.kvpatch.latents import latent_model
from tests.kvpatch.stacks import pairs, stock_model
from tests.mla import SMALL, Source, done, sources

_NATIVE = ("--target", "native")
_OURS = ("--target", "kvpatch")
_DEEPSEEK = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sources(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def made(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder by the name of its case."""
    root = tmp_path_factory.mktemp("made")

    def latent(name: str, shared: bool) -> Callable[[Path], object]:
        def write(folder: Path) -> None:
            sharing = pairs(name) if shared else None
            work = root / f"work-{folder.name}"
            work.mkdir()
            latent_model(name, stock_model(name), work, sharing)
            shutil.move(work / "latent", folder)

        return write

    def foreign(**keys: Any) -> Callable[[Path], object]:
        config = DeepseekV3Config(**{**_DEEPSEEK, **keys})
        return lambda folder: DeepseekV3ForCausalLM(config).save_pretrained(folder)

    def mla(name: str, *flags: object) -> Callable[[Path], object]:
        return lambda folder: done(source(name), folder, *SMALL, *flags)

    makers: dict[str, Callable[[Path], object]] = {
        "stock": lambda folder: shutil.copytree(source("llama"), folder),
        "native": mla("llama"),
        "ours": mla("llama", *_OURS),
        "window": mla("mistral:window"),
        "phi": mla("phi"),
        "normed": mla("qwen3"),
        "mla-shared": mla("llama", "--share", 2),
        "mla-per-layer": lambda folder: done(
            source("llama"), folder, "--kv-budget", "25%", "--per-layer"
        ),
        "ranks": latent("llama", shared=False),
        "shared": latent("llama", shared=True),
        "experts": foreign(first_k_dense_replace=1),
        "dense": foreign(first_k_dense_replace=2),
        "halves": foreign(first_k_dense_replace=2, rope_interleave=False),
        "yarn": foreign(
            first_k_dense_replace=2,
            rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        ),
    }

    def make(case: str) -> Path:
        folder = root / case
        if not folder.exists():
            makers[case](folder)
        return folder

    return make


# refused for what is in the weights
_WEIGHTS = {"norm"}
REFUSED: dict[str, tuple[str, tuple[str, ...], int, str]] = {
    "no-latents": ("stock", _NATIVE, 3, "llama has no latents; only results of kvpatch mla"),
    "already": ("ours", _OURS, 2, "this model is a KvpatchLlamaForCausalLM already"),
    "frequencies": ("ours", _NATIVE, 2, "its layers keep components of different frequencies"),
    "ranks": ("ranks", _NATIVE, 2, "its layers have latents of different ranks"),
    "shared": ("shared", _NATIVE, 2, "its layers share latents"),
    "mla-shared": ("mla-shared", _NATIVE, 2, "its layers share latents"),
    "mla-ranks": ("mla-per-layer", _NATIVE, 2, "its layers have latents of different ranks"),
    "mla-already": ("mla-shared", _OURS, 2, "this model is a KvpatchLlamaForCausalLM already"),
    "window": ("window", _NATIVE, 2, "it has sliding windows"),
    "norms": ("normed", _NATIVE, 2, "it normalises queries and keys"),
    "block": ("phi", _NATIVE, 2, "the block of phi is not attention and a gated MLP"),
    "experts": ("experts", _OURS, 3, "this is no result of kvpatch mla: it has experts"),
    "norm": ("dense", _OURS, 3, "layer 0: the latent norm changes latents by up to"),
    "halves": ("halves", _OURS, 3, "its rotary pairs are not neighbours"),
    "yarn": ("yarn", _OURS, 3, "its rotary positions are of kind 'yarn'"),
    "serving": ("native", (*_NATIVE, "--serving"), 2, "the rotary frequencies are a list"),
    "serving-float16": ("native", (*_NATIVE, "--serving", "--dtype", "float16"), 2, "of float16"),
    "serving-ours": ("native", (*_OURS, "--serving"), 2, "arch and serving are for native"),
    "arch-ours": ("native", (*_OURS, "--arch", "youtu"), 2, "arch and serving are for native"),
    "unknown-arch": ("native", (*_NATIVE, "--arch", "v2"), 2, "must be 'deepseek_v3' or 'youtu'"),
    "unknown-target": ("native", ("--target", "vllm"), 2, "must be 'native' or 'kvpatch'"),
}


@pytest.mark.parametrize("way", [(), ("--dry-run",)], ids=["run", "plan"])
@pytest.mark.parametrize("case", REFUSED)
def test_exports_that_cannot_be_exact_are_refused(
    made: Callable[[str], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    case: str,
    way: tuple[str, ...],
) -> None:
    name, flags, code, reason = REFUSED[case]
    folder = made(name)
    if case not in _WEIGHTS:
        request.getfixturevalue("no_weights")
    run = cli(["export", str(folder), str(tmp_path / "out"), *flags, *way])
    assert (run.code, run.out) == (code, ""), run.err
    assert reason in run.err
    assert not contents(tmp_path)


def _without_bias(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.kv_a_proj_with_mqa.bias"]
    save_file(weights, file, metadata={"format": "pt"})


def _with_keys(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = {**read_json(folder / "config.json"), **keys}
        (folder / "config.json").write_text(json.dumps(config))

    return change


_DAMAGED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "tensor": (
        "native",
        _without_bias,
        "layers.1.self_attn.kv_a_proj_with_mqa.bias: config says",
    ),
    "rank": ("native", _with_keys(kv_lora_rank=9), "config.json contradicts the tensors"),
    "layers": (
        "native",
        _with_keys(num_hidden_layers=3, first_k_dense_replace=3),
        "model.layers.2.self_attn.q_proj.weight: config says (96, 64), file has None",
    ),
    "config": ("ours", _with_keys(kv_lora_rank=[24]), "kv_lora_rank has 1 entries"),
    "class": ("native", _with_keys(model_type="glm4_moe_lite"), "'glm4_moe_lite' is not one of"),
    "manifest": (
        "native",
        lambda folder: (folder / "kvpatch.json").write_text('{"format_version": 1}') and None,
        "kvpatch.json has no calibration, files, layers, recipe, source",
    ),
}


@pytest.mark.parametrize("case", _DAMAGED)
def test_damaged_sources_are_refused(
    made: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest, case: str
) -> None:
    name, damage, reason = _DAMAGED[case]
    folder = shutil.copytree(made(name), tmp_path / "source")
    request.getfixturevalue("no_weights")
    damage(folder)
    target = _NATIVE if name == "ours" else _OURS
    run = cli(["export", str(folder), str(tmp_path / "out"), *target])
    assert (run.code, run.out) == (3, ""), run.err
    assert reason in run.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_hint_without_servers_is_a_command_that_works(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    run = cli(["export", str(made("native")), str(tmp_path / "out"), *_NATIVE, "--serving"])
    _, found, words = run.err.partition("leave --serving out: kvpatch ")
    assert found
    plan = cli([*shlex.split(words), "--dry-run"])
    assert plan.code == 0, plan.err
