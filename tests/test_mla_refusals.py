"""What ``kvpatch mla`` refuses: with a reason, exit code 2 and nothing written."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tests.families.stock import make
from tests.families.tiny import settings
from tests.faults.running import cli, contents
from tests.mla import SMALL, Source, done, mla, sources


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sources(tmp_path_factory.mktemp("mla"))


REFUSED_MODELS = {
    "persimmon": "the norm of its keys adds a bias",
    "phi:norm-tied": "the norm of its keys adds a bias",
    "olmo:bias-clip": "clip_qkv 0.7",
    "gemma2": "softcap of 0.9",
    "bloom": "ALiBi",
    "falcon": "ALiBi",
    "mixtral": "no class with latent attention holds a mixtral model",
    "qwen3_moe": "no class with latent attention holds a qwen3_moe model",
}


_each_way = pytest.mark.parametrize("way", [(), ("--dry-run",)], ids=["run", "plan"])


@_each_way
@pytest.mark.parametrize(("name", "reason"), REFUSED_MODELS.items())
@pytest.mark.usefixtures("no_weights")
def test_models_that_latents_cannot_hold_are_refused_by_name(
    source: Source, tmp_path: Path, name: str, reason: str, way: tuple[str, ...]
) -> None:
    run = mla(source(name), tmp_path / "out", *SMALL, *way)
    assert (run.code, run.out) == (2, "")
    assert name.partition(":")[0] in run.err
    assert reason in run.err
    assert "hint: Merge its KV heads instead" in run.err
    assert not contents(tmp_path)


_NATIVE = ("--target", "native", *SMALL)
REFUSED_FLAGS: dict[str, tuple[str, tuple[object, ...], str]] = {
    "norm": ("qwen3", _NATIVE, "holds this qwen3 model: it normalises queries and keys"),
    "norm-rank": ("qwen3", ("--rank", 50, "--rope-dims", 2), "width of 48 and one constant"),
    "window": ("mistral:window", _NATIVE, "it has sliding windows"),
    "qwen2-window": ("qwen2:window-tied", _NATIVE, "it has sliding windows"),
    "block": ("phi", _NATIVE, "the block of phi is not"),
    "no-pair": ("llama", ("--rank", 8, "--rope-dims", 0, "--arch", "youtu"), "--arch youtu: no "),
    "arch": ("llama", (*SMALL, "--target", "kvpatch", "--arch", "youtu"), "for native results"),
    "rank": ("llama", ("--rank", 65, "--rope-dims", 2), "--rank 65 is more than this model's "),
    "rope": ("llama", ("--rank", 8, "--rope-dims", 66), "--rope-dims 66 is more than the 64 dims"),
    "stride": (
        "llama",
        ("--rank", 8, "--rope-dims", 18, "--rope-select", "stride"),
        "more than the 16 dims that rotate in one key",
    ),
    "per-frequency": (
        "llama",
        ("--rank", 8, "--rope-dims", 18, "--rope-select", "per-frequency"),
        "more than the 16 dims that rotate in one key",
    ),
    "budget-rank": ("llama", ("--kv-budget", "512+64"), "--kv-budget: a rank of 512 is more"),
    "budget-rope": ("llama", ("--kv-budget", "8+66"), "--kv-budget: 66 rotary dims is more than"),
    "no-rope": ("gpt2", SMALL, "this gpt2 model has no rotary positions"),
    "odd": ("llama", ("--rank", 8, "--rope-dims", 3), "rope_dims 3 is odd"),
    "nothing": ("llama", (), "give rank and rope_dims, or kv_budget alone"),
    "half": ("llama", ("--rank", 8), "give rank and rope_dims, or kv_budget alone"),
    "both": ("llama", (*SMALL, "--kv-budget", "25%"), "or kv_budget alone"),
    "zero": ("llama", ("--rank", 0, "--rope-dims", 2), "rank: "),
    "tiny-budget": ("llama", ("--kv-budget", "0.5%"), "leaves 0 values per token and layer"),
    "no-budget": ("llama", ("--kv-budget", "a lot"), "'a lot' is neither a share such as 25%"),
    "odd-budget": ("llama", ("--kv-budget", "24+7"), "an even number of rotary dims"),
    "uneven-sizes": ("llama", (*SMALL, "--per-layer"), "distributes a kv_budget such as 25%"),
    "uneven-split": ("llama", ("--kv-budget", "24+8", "--per-layer"), "a kv_budget such as 25%"),
    "uneven-native": (
        "llama",
        ("--kv-budget", "25%", "--per-layer", "--target", "native"),
        "classes of transformers: they have one rank for all layers",
    ),
    "uneven-serving": (
        "wide",
        ("--kv-budget", "25%", "--per-layer", "--serving"),
        "per_layer does not go with serving",
    ),
    "shared-native": (
        "llama",
        (*SMALL, "--share", 2, "--target", "native"),
        "classes of transformers: in them every layer has a latent of its own",
    ),
    "shared-norm": (
        "qwen3",
        (*SMALL, "--share", 2),
        "--share 2 does not work here: this qwen3 model norms its keys",
    ),
    "shared-arch": ("llama", (*SMALL, "--share", 2, "--arch", "youtu"), "with arch youtu"),
    "shared-by-one": ("llama", (*SMALL, "--share", 1), "share: "),
    "shared-range": ("llama", (*SMALL, "--share", 2, "--layers", "1:9"), "is no range of the 2"),
    "shared-auto": ("llama", (*SMALL, "--share", 2, "--layers", "auto"), "is for kvpatch cla"),
    "layers-alone": ("llama", (*SMALL, "--layers", "0:2"), "layers says which layers share"),
    "shared-rope": (
        "llama",
        ("--rank", 8, "--rope-dims", 130, "--share", 2),
        "--rope-dims 130 is more than the 128 dims that rotate in all keys",
    ),
    "shared-kinds": (
        "smollm3",
        (*SMALL, "--share", 4),
        "cannot share keys and values: one has another window or other positions",
    ),
    "selection": ("llama", (*SMALL, "--rope-select", "best"), "'per-frequency' or 'stride'"),
    "unknown-arch": ("llama", (*SMALL, "--arch", "deepseek_v2"), "'deepseek_v3' or 'youtu'"),
    "refit": ("llama", (*SMALL, "--refit", "o"), "refit o needs a calibration text"),
    "serving-greedy": (
        "wide",
        ("--serving", "--rope-select", "greedy", "--kv-budget", "256+64"),
        "no common base",
    ),
    "serving-sizes": ("wide", ("--serving", "--kv-budget", "100+64"), "neither 320 nor 576"),
    "serving-rank": ("wide", ("--serving", "--kv-budget", "512+64"), "a rank of 512 is more"),
    "serving-share": (
        "wide",
        ("--serving", "--kv-budget", "50%"),
        "however --kv-budget 50% is split: vLLM: a cached token has 24 + 40 numbers, neither 320",
    ),
    "serving-class": ("phi", ("--serving", *SMALL), "the block of phi is not"),
    "serving-pair": ("llama", ("--serving", "--kv-budget", "24+0"), "no rotary pair is kept"),
    "serving-biases": ("qwen2", ("--serving", *SMALL), "has biases"),
    "serving-ours": ("wide", ("--serving", "--target", "kvpatch", *SMALL), "native results"),
    "serving-youtu": (
        "wide",
        ("--serving", "--arch", "youtu", "--kv-budget", "256+64"),
        "model_type youtu is not known everywhere",
    ),
    "serving-float16": (
        "wide",
        ("--serving", "--dtype", "float16", "--kv-budget", "256+64"),
        "float16",
    ),
}


@_each_way
@pytest.mark.parametrize("case", REFUSED_FLAGS)
@pytest.mark.usefixtures("no_weights")
def test_flags_that_cannot_be_followed_are_refused(
    source: Source, tmp_path: Path, case: str, way: tuple[str, ...]
) -> None:
    name, flags, reason = REFUSED_FLAGS[case]
    run = mla(source(name), tmp_path / "out", *flags, *way)
    assert (run.code, run.out) == (2, ""), run.err
    assert reason in run.err
    assert not contents(tmp_path)


_MENDED: dict[str, tuple[str, tuple[object, ...], tuple[object, ...]]] = {
    "range": (
        "llama",
        (*SMALL, "--share", 2, "--layers", "1:9"),
        (*SMALL, "--share", 2, "--layers", "0:2"),
    ),
    "kinds": (
        "smollm3",
        (*SMALL, "--share", 4),
        (*SMALL, "--share", 2, "--layers", "0:2"),
    ),
    "no-rope": ("gpt2", ("--kv-budget", "24+8"), ("--kv-budget", "24+0")),
    "no-rope-sizes": ("gpt2", SMALL, ("--rank", 24, "--rope-dims", 0)),
}


@pytest.mark.parametrize("case", _MENDED)
def test_a_hint_leads_to_what_works(source: Source, tmp_path: Path, case: str) -> None:
    """Its flags are those of the mended command, and it says nothing of values that are refused."""
    name, flags, mended = _MENDED[case]
    _, hint = mla(source(name), tmp_path / "out", *flags).err.splitlines()
    assert "auto" not in hint
    advised = re.findall(r"--[a-z-]+", hint)
    assert advised
    assert set(advised) <= set(mended)
    assert mla(source(name), tmp_path / "out", *mended).code == 0


# hidden width, head width, KV heads, and what servers take of it
_SHAPES: dict[str, tuple[int, int, int, list[str]]] = {
    "wide heads": (1024, 128, 8, ["512+64", "256+64"]),
    "odd heads": (640, 80, 8, ["496+80", "240+80"]),
    "few heads": (576, 64, 3, ["256+64"]),
    "narrow heads": (512, 32, 16, ["288+32"]),
    "just enough": (300, 20, 15, ["300+20"]),
    "too narrow": (256, 32, 8, []),
    "one head": (256, 64, 1, []),
    "four heads": (256, 64, 4, ["256+64"]),
}
_ASKED = [
    ("--kv-budget", "50%"),
    ("--kv-budget", "2000+64"),
    ("--rank", "100", "--rope-dims", "130"),
    ("--kv-budget", "1%", "--rope-select", "greedy"),
    ("--kv-budget", "256+64", "--rope-select", "per-frequency"),
    ("--kv-budget", "256+64", "--arch", "youtu"),
]


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("shapes of models")

    @cache
    def saved(name: str) -> Path:
        hidden, width, kv_heads, _ = _SHAPES[name]
        keys = {"hidden_size": hidden, "head_dim": width, "num_key_value_heads": kv_heads}
        heads = {"num_attention_heads": hidden // width, "num_hidden_layers": 1}
        make("llama", settings("llama") | keys | heads).save_pretrained(root / name)
        return root / name

    return saved


def _command(hint: str) -> list[str]:
    """The command at the end of a hint."""
    _, found, rest = hint.partition("kvpatch mla ")
    assert found, hint
    return ["mla", *shlex.split(rest), "--dry-run", "--json"]


@pytest.mark.parametrize("asked", _ASKED, ids=" ".join)
@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.usefixtures("no_weights")
def test_what_servers_refuse_is_mended_by_the_command_of_the_hint(
    shaped: Source, tmp_path: Path, shape: str, asked: tuple[str, ...]
) -> None:
    source, out, takes = shaped(shape), tmp_path / "out", _SHAPES[shape][3]
    refused = mla(source, out, "--serving", *asked, "--dry-run")
    assert (refused.code, refused.out) == (2, "")
    _, hint = refused.err.splitlines()
    plain = mla(source, out, *asked, "--dry-run")
    if "kvpatch mla" not in hint:  # the sizes do not fit the model, and no others fit servers
        assert not takes
        assert plain.err == refused.err
        return
    plan = cli(_command(hint))
    assert plan.code == 0, plan.err
    if hint.startswith("hint: Leave --serving out: "):
        assert not takes or "youtu" in asked
        return
    data = json.loads(plan.out)
    latent, good = data["latent"], "Leave --rope-select out" in hint
    assert f"{latent['rank']}+{latent['rope_dims']}" in (asked if good else takes)
    assert good or set(re.findall(r"\d+\+\d+", hint.partition(":")[2])) == set(takes)
    assert all("serves it" in note for note in latent["servers"].values())
    before, after = data["kv_bytes_per_token"]
    assert good or after < before


@pytest.mark.parametrize(
    ("shape", "share", "held"),
    [
        # 320 numbers, however they are split
        ("wide heads", "15.625%", [[280, 40], [240, 80], [200, 120], [192, 128]]),
        # 400 numbers, but no rank above 256: with 50 rotary dims that makes 306
        ("four heads", "78.125%", [[256, 64]]),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_of_a_share_servers_get_a_split_that_they_hold(
    shaped: Source, tmp_path: Path, shape: str, share: str, held: list[list[int]]
) -> None:
    flags = ("--kv-budget", share, "--serving", "--dry-run", "--json")
    run = mla(shaped(shape), tmp_path / "out", *flags)
    assert run.code == 0, run.err
    latent = json.loads(run.out)["latent"]
    assert latent.get("splits", held) == held
    assert [latent["rank"], latent["rope_dims"]] == held[-1]
    assert all("serves it" in note for note in latent["servers"].values())


@pytest.mark.parametrize("model", ["qwen2", "gemma", "phi", "llama3"])
def test_what_servers_never_load_is_mended_without_them(
    source: Source, tmp_path: Path, model: str
) -> None:
    folder = tmp_path / model if model == "llama3" else source(model)
    if model == "llama3":
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        make("llama", settings("llama") | {"rope_parameters": rope}).save_pretrained(folder)
    for asked in (("--kv-budget", "50%"), (*SMALL, "--target", "native")):
        refused = mla(folder, tmp_path / "out", "--serving", *asked)
        assert refused.code == 2
        _, hint = refused.err.splitlines()
        assert hint.startswith("hint: Leave --serving out: kvpatch mla")
        plan = cli(_command(hint))
        assert plan.code == 0, plan.err


def test_a_result_is_not_converted_again(source: Source, tmp_path: Path) -> None:
    for target in ("native", "kvpatch"):
        out = done(source("llama"), tmp_path / target, *SMALL, "--target", target)
        again = mla(out, tmp_path / "again", *SMALL)
        assert again.code in (2, 3)
        assert "already" in again.err
        shown = cli(["inspect", str(out)])
        assert shown.code == 3
        assert "caches a latent already (MLA)" in shown.err
