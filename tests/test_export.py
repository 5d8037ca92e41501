"""``kvpatch export``: what it writes computes what it was made from, trained or not."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.reader import read_json
from convert.verify import verify_checkpoint
from tests.families.stock import full_logits, load, make, random_ids
from tests.families.texts import random_text, write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import Run, SignalAfterShard, cli, contents, names, run_child
from tests.helpers import assert_close
from tests.targets.latent_sources import real_float64

# a plain block; biases of queries; factors of norms and embeddings; fused and tied tensors;
# layers without positions; interleaved pairs in a part of the head
_MODELS = ("llama", "qwen2", "gemma", "granite:bias-tied", "phi3", "smollm3", "glm")
_SIZES = ("--rank", "24", "--rope-dims", "8")
_FORMS: dict[str, tuple[str, ...]] = {
    "native": ("--target", "native", *_SIZES),
    "kvpatch": ("--target", "kvpatch", "--rope-select", "stride", "--rank", "24", "--rope-dims=4"),
    "serving": ("--serving", "--rope-select", "stride", "--kv-budget", "256+64"),
}
_WIDE = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 1}

# the result of kvpatch mla of a model in a form, in float64
Converted = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("mla")

    @cache
    def source(name: str) -> Path:
        folder = root / name.replace(":", "-")
        keys = _WIDE if name == "wide" else {}
        family = "llama" if name == "wide" else name
        make(family, settings(family) | keys).double().save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    @cache
    def result(name: str, form: str) -> Path:
        folder = root / f"{name.replace(':', '-')}-{form}"
        with real_float64():
            done("mla", source(name), folder, *_FORMS[form])
        return folder

    return result


def run(command: str, source: Path, out: Path, *flags: object) -> Run:
    return cli([command, str(source), str(out), *map(str, flags)])


def done(command: str, source: Path, out: Path, *flags: object) -> Path:
    ended = run(command, source, out, *flags)
    assert (ended.code, ended.out) == (0, f"{out}\n"), ended.err
    return out


def exported(source: Path, out: Path, *flags: object) -> Path:
    """An export with tables of positions in float64."""
    with real_float64():
        return done("export", source, out, *flags)


def assert_same(source: Path, *results: Path) -> None:
    """Fail unless all folders give the same logits in float64."""
    model = load(source)
    ids = random_ids(model, 12)
    expected = full_logits(model, ids)
    for result in results:
        assert_close(full_logits(load(result), ids), expected, atol=1e-10)


def trained(
    source: Path, folder: Path, keep: Callable[[str, Tensor], Tensor] | None = None
) -> Path:
    """A copy of a model whose weights have all moved, saved by transformers.

    Args:
        source: The model.
        folder: Of the copy.
        keep: What is true where a weight, given by name and value, stays.
    """
    model = load(source)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            moved = 0.1 * noise * weight.abs().mean().clamp(0.3, 1)
            weight.add_(moved if keep is None else moved.masked_fill(keep(name, weight), 0))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    shutil.copy(source / "kvpatch.json", folder)
    return folder


def constant_dims(name: str, weight: Tensor) -> Tensor:
    """Where the down-projections have the rows of their constant dims, which stand still."""
    still = torch.zeros_like(weight, dtype=torch.bool)
    if name.endswith(("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias")):
        still[24] = True
    if name.endswith("q_a_proj.weight"):
        still[-1] = True
    return still


@pytest.mark.parametrize("name", _MODELS)
def test_forms_of_a_model_compute_the_same(converted: Converted, tmp_path: Path, name: str) -> None:
    native = converted(name, "native")
    ours = exported(native, tmp_path / "ours", "--target", "kvpatch")
    youtu = exported(ours, tmp_path / "youtu", "--target", "native", "--arch", "youtu")
    assert_same(native, ours, youtu)
    config = read_json(ours / "config.json")
    assert config["architectures"] == ["KvpatchLlamaForCausalLM"]
    assert config["kv_lora_rank"] == [24] * config["num_hidden_layers"]
    assert not {"q_lora_rank", "qk_rope_head_dim", "n_routed_experts"} & config.keys()
    assert read_json(youtu / "config.json")["kv_lora_rank"] == 25
    assert (ours / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", _MODELS)
def test_our_class_of_any_block_becomes_a_stock_one(
    converted: Converted, tmp_path: Path, name: str
) -> None:
    """The block of the source, with its factors, norms and fused tensors, goes with it."""
    ours = converted(name, "kvpatch")
    assert_same(ours, exported(ours, tmp_path / "native", "--target", "native"))


@pytest.mark.parametrize("name", ["llama", "gemma", "glm"])
def test_what_was_trained_is_what_is_exported(
    converted: Converted, tmp_path: Path, name: str
) -> None:
    """All weights move, so that queries, latents and outputs have biases that they had not."""
    moved = trained(converted(name, "kvpatch"), tmp_path / "trained")
    native = exported(moved, tmp_path / "native", "--target", "native")
    assert read_json(native / "config.json")["q_lora_rank"] is not None
    back = exported(native, tmp_path / "back", "--target", "kvpatch")
    assert_same(moved, native, back)
    with pytest.raises(AssertionError, match="largest difference"):
        assert_same(converted(name, "kvpatch"), native)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_trained_stock_model_is_exported(converted: Converted, tmp_path: Path, name: str) -> None:
    """Weights of norms, biases of latents, and what the constant is multiplied by may move."""
    moved = trained(converted(name, "native"), tmp_path / "trained", constant_dims)
    ours = exported(moved, tmp_path / "ours", "--target", "kvpatch")
    again = exported(moved, tmp_path / "again", "--target", "native")
    assert_same(moved, ours, again)
    assert max(layer["norm_error"] for layer in read_manifest(ours)["layers"]) < 1e-16


@pytest.mark.parametrize("part", ["kv_a_proj_with_mqa", "q_a_proj"])
def test_a_latent_norm_that_does_something_is_refused(
    converted: Converted, tmp_path: Path, part: str
) -> None:
    moved = trained(converted("qwen2", "native"), tmp_path / "moved", lambda *_: torch.tensor(True))
    file = moved / "model.safetensors"
    weights = load_file(file)
    row = weights[f"model.layers.1.self_attn.{part}.weight"][24 if "kv" in part else -1]
    row += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    refused = run("export", moved, tmp_path / "out", "--target", "kvpatch")
    assert refused.code == 3
    assert "layer 1: the latent norm changes latents by up to" in refused.err
    assert "more than float64 rounds (1.1e-16)" in refused.err
    assert "--target kvpatch writes a form without such a norm" in refused.err
    assert names(tmp_path) == ["moved"]
    # of what bfloat16 rounds anyway it is nothing
    out = done("export", moved, tmp_path / "out", "--target", "kvpatch", "--dtype", "bfloat16")
    first, second = (layer["norm_error"] for layer in read_manifest(out)["layers"])
    assert first < 1e-16 < 1e-9 < second < 2**-9


def test_servers_get_back_what_they_can_load(converted: Converted, tmp_path: Path) -> None:
    served = converted("wide", "serving")
    ours = exported(served, tmp_path / "ours", "--target", "kvpatch")
    again = exported(ours, tmp_path / "again", "--target", "native", "--serving")
    biased = exported(ours, tmp_path / "biased", "--target", "native")
    assert_same(served, ours, again, biased)
    assert read_json(again / "config.json") == read_json(served / "config.json")
    assert not [name for name in load_file(again / "model.safetensors") if "bias" in name]
    assert read_json(biased / "config.json")["kv_lora_rank"] == 257
    moved = trained(ours, tmp_path / "moved", lambda name, _: torch.tensor("bias" not in name))
    refused = run("export", moved, tmp_path / "out", "--target", "native", "--serving")
    assert refused.code == 3
    assert "for which a file without biases has no place" in refused.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_float16_and_bfloat16_are_as_good_as_what_they_came_from(
    converted: Converted, tmp_path: Path
) -> None:
    native = converted("llama", "native")
    model = load(native)
    ids = random_ids(model, 12)
    exact = full_logits(model, ids)
    for dtype, most in (("bfloat16", 0.05), ("float16", 0.006)):
        half = done("export", native, tmp_path / dtype, "--target", "kvpatch", "--dtype", dtype)
        assert read_json(half / "config.json")["dtype"] == dtype
        error = (full_logits(load(half), ids) - exact).abs().max() / exact.abs().max()
        assert 1e-5 < float(error) < most


def test_lineage_and_card_tell_the_whole_story(converted: Converted, tmp_path: Path) -> None:
    native = converted("llama", "native")
    ours = exported(native, tmp_path / "ours", "--target", "kvpatch")
    moved = trained(ours, tmp_path / "moved")
    last = exported(moved, tmp_path / "last", "--target", "native")
    manifest, first = read_manifest(last), read_manifest(native)
    assert [(step["recipe"]["method"], step["trained"]) for step in manifest["lineage"]] == [
        ("mla", False),
        ("export", True),
    ]
    for key in ("source", "recipe", "calibration", "layers"):
        assert manifest["lineage"][0][key] == first[key]
    assert manifest["source"]["architecture"] == "KvpatchLlamaForCausalLM"
    assert manifest["kv_cache"]["kv_heads"] == [None, None]
    assert manifest["kv_cache"]["latent"] == {"rank": 24, "rope_dims": 8}
    assert manifest["kv_cache"]["bytes_per_token"] == [2 * 8 * 32, 2 * 8 * 33]
    assert manifest["recipe"] == {
        "method": "export",
        "target": "native",
        "arch": "deepseek_v3",
        "serving": False,
        "max_shard_size": "5GB",
        "allow_pickle": False,
        "allow_nonfinite": False,
    }
    card = (last / "README.md").read_text()
    for words in (
        "# llama, MLA 24+8",
        "moved, converted by kvpatch from KvpatchLlamaForCausalLM to DeepseekV3ForCausalLM",
        "| cached in a layer | latent of 24, rotary key of 8 | latent of 24, rotary key of 8 |",
        "mixed across heads by a complex matrix",
        "Then its weights were changed, as by training.",
        "Energy that was lost",
        "# stock DeepseekV3ForCausalLM",
    ):
        assert words in card
    assert "does not hold latents" not in card
    (moved / "kvpatch.json").unlink()
    told = run("export", moved, tmp_path / "untold", "--target", "native")
    assert "warning: the model was saved without its kvpatch.json" in told.err
    assert "How the source was made is not recorded." in (tmp_path / "untold/README.md").read_text()
    assert read_manifest(tmp_path / "untold")["lineage"] == []


def test_what_was_calibrated_is_not_judged_on_its_text(tmp_path: Path) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    make("llama", settings("llama")).save_pretrained(source)
    write_tokenizer(source)
    text.write_text(random_text(400, seed=0))
    calibration = ("--calibration", text, "--samples", 4, "--context", 24, "--refit", "none")
    native = done("mla", source, tmp_path / "native", *_SIZES, *calibration)
    ours = done("export", native, tmp_path / "ours", "--target", "kvpatch")
    assert read_manifest(ours)["calibration"] == read_manifest(native)["calibration"]
    flags = ("--text", str(text), "--context", "24", "--samples", "2", "--save")
    refused = cli(["eval", str(ours), *flags])
    assert refused.code == 2
    assert "is a text that" in refused.err
    to = tmp_path / "report"
    report = cli(["report", str(ours), "--to", str(to)])
    assert report.code == 2
    assert "was exported" in report.err


def test_verify_compares_an_export_with_its_source(converted: Converted, tmp_path: Path) -> None:
    for name, form, target in (("gemma", "kvpatch", "native"), ("wide", "serving", "kvpatch")):
        source = converted(name, form)
        out = done("export", source, tmp_path / name, "--target", target)
        checks = {check.name: check for check in verify_checkpoint(out, source)}
        assert {c.status for key, c in checks.items() if key != "shapes"} == {"ok"}, checks
        assert not checks["untouched tensors"].detail.startswith("0 ")


def test_a_plan_says_what_the_result_is(converted: Converted, tmp_path: Path) -> None:
    native, out = converted("qwen2", "native"), tmp_path / "out"
    flags = ("--target", "kvpatch", "--dry-run")
    data = json.loads(run("export", native, out, *flags, "--json").out)
    shown = run("export", native, out, *flags)
    assert not contents(tmp_path)
    assert data["latent"] == {"rank": 24, "rope_dims": 8, "servers": {}}
    assert data["kv_heads"] == [None, None]
    assert data["class"] == "KvpatchLlamaForCausalLM"
    assert shown.out.count("latent of 24, rotary key of 8") == 2
    assert "kv_a_layernorm.weight" in shown.out
    done("export", native, out, "--target", "kvpatch")
    tensors = load_file(out / "model.safetensors")
    planned = {t["name"]: t["after"] for t in data["tensors"] if t["after"] is not None}
    planned |= {t["name"]: t["shape"] for t in data["added_tensors"]}
    assert planned == {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert read_manifest(out)["kv_cache"]["bytes_per_token"] == data["kv_bytes_per_token"]
    again = run("export", native, out, "--target", "kvpatch")
    assert again.code == 7
    assert "--overwrite" in again.err


def test_a_killed_run_continues_to_equal_bytes(converted: Converted, tmp_path: Path) -> None:
    native = converted("llama", "native")
    flags = ("--target", "kvpatch", "--max-shard-size", "40KB")
    whole = done("export", native, tmp_path / "whole", *flags)
    out = tmp_path / "out"
    command = ["export", str(native), str(out), *flags]
    assert run_child(command, SignalAfterShard(signal.SIGKILL, 2)).code == -signal.SIGKILL
    assert cli(command).code == 0
    assert contents(out) == contents(whole)
    assert names(tmp_path) == ["out", "whole"]


def test_a_recipe_gives_the_bytes_of_its_flags(converted: Converted, tmp_path: Path) -> None:
    native = converted("llama", "native")
    flags = done("export", native, tmp_path / "flags", "--target", "native", "--arch", "youtu")
    recipe = tmp_path / "export.yaml"
    recipe.write_text(f"method: export\nsource: {native}\ntarget: native\narch: youtu\n")
    assert cli(["run", str(recipe), "--set", f"output={tmp_path / 'out'}"]).code == 0
    assert contents(tmp_path / "out") == contents(flags)
