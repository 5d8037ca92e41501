"""Rotary tables that change with the length: generation across the change, cached keys and all.

A stock class keeps keys as their old table turned them, or computes all of them anew (phi3). A
result that loses nothing must do what its source does, token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from convert.targets.dense_blocks import BLOCKS
from tests.families.stock import Float64, change_kv_heads, full_logits, load, make, random_ids
from tests.families.texts import write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import Run, cli
from tests.helpers import assert_close, assert_equal
from tests.targets.latent_sources import real_float64

_SWITCH, _PROMPT, _NEW = 16, 10, 12  # tokens
_DYNAMIC = {
    "max_position_embeddings": _SWITCH,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


def _longrope(name: str, planes: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "short_factor": [1 + 0.1 * plane for plane in range(planes)],
        "long_factor": [1 + 0.9 * plane for plane in range(planes)],
    }
    original = {"original_max_position_embeddings": _SWITCH}
    if name == "phi3":  # as its files have it
        return {"rope_scaling": {"type": "longrope", **rope}, **original}
    partial = {"partial_rotary_factor": 0.5} if name == "glm" else {}
    rope |= {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **original, **partial}
    return {"rope_parameters": rope}


def _planes(name: str) -> int:
    keys = settings(name)
    width = keys.get("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    return int(width // (4 if name == "glm" else 2))


# a model whose heads are copies in pairs, by its name and the kind of its table, in float64
Switching = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def switching(tmp_path_factory: pytest.TempPathFactory) -> Switching:
    root = tmp_path_factory.mktemp("switching")

    @cache
    def saved(name: str, kind: str) -> Path:
        folder = root / f"{name}-{kind}"
        rope = _DYNAMIC if kind == "dynamic" else _longrope(name, _planes(name))
        model = make(name, settings(name) | rope, seed=3)
        change_kv_heads(model, 2, lambda heads: heads[0], dtype=torch.float32)
        model.double().save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return saved


@torch.no_grad()
def _generated(folder: Path) -> tuple[Tensor, Tensor]:
    """Tokens that follow the likeliest way, and the logits of each step, with a cache."""
    model = load(folder)
    ids = random_ids(model, _PROMPT)
    with real_float64():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=_NEW,
            max_new_tokens=_NEW,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    return out.sequences, torch.stack(out.logits, 1)


def _assert_generates_the_same(source: Path, *results: Path) -> None:
    tokens, logits = _generated(source)
    # both tables were used: later, all tokens would have the other one
    with Float64():
        later = full_logits(load(source), tokens)[:, _PROMPT - 1 : -1]
    assert float((later - logits)[:, : _SWITCH - _PROMPT].abs().max()) > 1e-3
    for result in results:
        found, own = _generated(result)
        assert_equal(found, tokens)
        assert_close(own, logits, atol=1e-9)


def _whole(source: Path) -> list[str]:
    """Sizes that leave nothing out."""
    facts = read_facts(read_json(source / "config.json"))
    turning = facts.geometry.kv_heads * max(rope.dim for rope in facts.ropes)
    rank = facts.geometry.hidden + (facts.qk_norm is not None)
    return ["--rank", str(rank), "--rope-dims", str(turning)]


def _run(command: str, source: Path, out: Path, *flags: str) -> Run:
    with real_float64():
        return cli([command, str(source), str(out), *flags])


def _done(command: str, source: Path, out: Path, *flags: str) -> Path:
    run = _run(command, source, out, *flags)
    assert run.code == 0, run.err
    return out


_KINDS = [*((name, "longrope") for name in sorted(BLOCKS)), ("llama", "dynamic")]
_KINDS += [("qwen3", "longrope"), ("qwen3", "dynamic"), ("phi", "dynamic")]
# what native classes of latents cannot do as the source does
_OURS = {"phi3", "qwen3", "phi"}


@pytest.mark.parametrize(("name", "kind"), _KINDS)
def test_latents_generate_across_the_change_as_their_source_does(
    switching: Switching, tmp_path: Path, name: str, kind: str
) -> None:
    source = switching(name, kind)
    ours = _done("mla", source, tmp_path / "ours", *_whole(source), "--target", "kvpatch")
    default = _done("mla", source, tmp_path / "default", *_whole(source))
    _assert_generates_the_same(source, ours, default)
    native = kind == "longrope" and name not in _OURS
    architecture = read_json(default / "config.json")["architectures"][0]
    assert (architecture == "DeepseekV3ForCausalLM") is native


@pytest.mark.parametrize(("name", "kind"), [("phi3", "longrope"), ("llama", "dynamic")])
def test_what_native_latents_cannot_do_is_refused_by_name(
    switching: Switching, tmp_path: Path, name: str, kind: str
) -> None:
    source = switching(name, kind)
    reason = (
        f"beyond {_SWITCH} tokens it has other rotary frequencies, and its class then computes all "
        "cached keys anew"
        if kind == "longrope"
        else "its rotary positions are of kind 'dynamic'"
    )
    ours = _done("mla", source, tmp_path / "ours", *_whole(source), "--target", "kvpatch")
    for run in (
        _run("mla", source, tmp_path / "out", *_whole(source), "--target", "native"),
        _run("mla", source, tmp_path / "out", *_whole(source), "--serving"),
        _run("export", ours, tmp_path / "out", "--target", "native"),
    ):
        assert (run.code, run.out) == (2, "")
        assert reason in run.err


def test_exports_generate_across_the_change_as_their_source_does(
    switching: Switching, tmp_path: Path
) -> None:
    source = switching("llama", "longrope")
    native = _done("mla", source, tmp_path / "native", *_whole(source))
    ours = _done("export", native, tmp_path / "ours", "--target", "kvpatch")
    again = _done("export", ours, tmp_path / "again", "--target", "native")
    _assert_generates_the_same(source, ours, again)


@pytest.mark.parametrize("target", ["native", "kvpatch"])
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")]
)
def test_merged_heads_generate_across_the_change_as_their_source_does(
    switching: Switching, tmp_path: Path, name: str, kind: str, target: str
) -> None:
    source = switching(name, kind)
    flags = ("--kv-heads", "2", "--target", target)
    _assert_generates_the_same(source, _done("gqa", source, tmp_path / "out", *flags))


_CAVEAT = f"eyond {_SWITCH} tokens this model has other rotary frequencies: the rotary key has them"


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")]
)
def test_a_table_that_is_kept_for_all_lengths_is_said(
    switching: Switching, tmp_path: Path, name: str, kind: str
) -> None:
    source = switching(name, kind)
    sizes = ("--rank", "16", "--rope-dims", "4")
    plan = _run("mla", source, tmp_path / "out", *sizes, "--dry-run")
    assert f"warning: b{_CAVEAT}" in plan.err
    out = _done("mla", source, tmp_path / "out", *sizes)
    assert f"\nB{_CAVEAT}" in (out / "README.md").read_text()
    if read_json(out / "config.json")["model_type"] == "deepseek_v3":  # an export keeps it
        again = _done("export", out, tmp_path / "again", "--target", "kvpatch")
        assert read_manifest(again)["caveats"] == read_manifest(out)["caveats"]
        assert f"\nB{_CAVEAT}" in (again / "README.md").read_text()
    whole = _run("mla", source, tmp_path / "whole", *_whole(source), "--dry-run")
    assert "rotary frequencies" not in whole.err


def test_a_table_for_all_lengths_needs_no_caveat(tmp_path: Path) -> None:
    equal = {"short_factor": [1.5] * 10, "long_factor": [1.5] * 10}
    rope = {**_longrope("llama", 10)["rope_parameters"], **equal}
    make("llama", settings("llama") | {"rope_parameters": rope}).save_pretrained(tmp_path / "src")
    flags = ("--rank", "16", "--rope-dims", "4", "--dry-run")
    run = _run("mla", tmp_path / "src", tmp_path / "out", *flags)
    assert run.code == 0
    assert "rotary frequencies" not in run.err
