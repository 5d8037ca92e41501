"""Latents of different sizes, and latents that layers share, through the whole pipeline.

Checkpoints are in float64 and stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from convert import convert, make_recipe
from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.reader import Checkpoint, read_json
from convert.facts import ModelFacts, read_facts
from convert.latent_sizes import budget_of
from convert.survey import survey
from convert.verify import cache_bytes, verify_checkpoint
from tests.families.stock import full_logits, load, make, random_ids
from tests.families.texts import random_text, token_ids, write_tokenizer
from tests.families.tiny import settings
from tests.helpers import assert_close, assert_equal

_LAYERS, _SAMPLES, _CONTEXT, _TEXT = 4, 8, 32, 1200
_NOTHING = 1e-9  # what is left of outputs that are not to change anything

Source = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    @cache
    def saved(name: str, change: Callable[[Any], None] | None = None) -> Path:
        more = {"no_rope_layers": [1, 1, 0, 0]} if name == "smollm3" else {}
        model = make(name, settings(name) | {"num_hidden_layers": _LAYERS} | more, seed=5).double()
        if change is not None:
            change(model)
        folder = tmp_path_factory.mktemp("uneven") / "model"
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return saved


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text(random_text(_TEXT, seed=0))
    return file


def _mla(source: Path, out: Path, text: Path | None = None, **keys: Any) -> Path:
    """Convert with ``text`` if there is one, without refits unless they are asked for."""
    if text is not None:
        calibration = {"calibration": str(text), "samples": _SAMPLES, "context": _CONTEXT}
        keys = {**calibration, "refit": "none", **keys}
    convert(make_recipe({"method": "mla", "source": str(source), "output": str(out), **keys}))
    return out


def _facts(folder: Path) -> ModelFacts:
    return read_facts(read_json(folder / "config.json"))


def _sizes(folder: Path) -> list[tuple[int, int]]:
    """Pairs and rank of each layer."""
    config = read_json(folder / "config.json")
    ranks, planes = config["kv_lora_rank"], config["kv_rope_planes"]
    return [(len(own), rank) for rank, own in zip(ranks, planes, strict=True)]


@torch.no_grad()
def _idle_producers(model: Any) -> None:
    """Make every other layer leave the residual stream as it is, so that its reader sees the same.

    The norms of the two may differ, which the prediction of one input from the other has to find.
    """
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for block in blocks[::2]:
        norm = block.ln_1 if hasattr(block, "ln_1") else block.input_layernorm
        norm.weight.copy_(norm.weight.abs().clamp(min=0.5))  # a ridge hides dims of no power
        attention = block.attn if hasattr(block, "attn") else block.self_attn
        for part in (attention, block.mlp):
            name = (
                "c_proj" if hasattr(part, "c_proj") else ("o_proj", "down_proj")[part is block.mlp]
            )
            for parameter in getattr(part, name).parameters():
                parameter.mul_(_NOTHING)


@torch.no_grad()
def _idle_producers_of_one_norm(model: Any) -> None:
    _idle_producers(model)
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for producer, reader in zip(blocks[::2], blocks[1::2], strict=True):
        name = "ln_1" if hasattr(producer, "ln_1") else "input_layernorm"
        getattr(reader, name).load_state_dict(getattr(producer, name).state_dict())


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "text"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_what_a_reader_sees_of_its_producer_is_shared_without_loss(
    source: Source, tmp_path: Path, text: Path, name: str, calibrated: bool
) -> None:
    model = source(name, _idle_producers if calibrated else _idle_producers_of_one_norm)
    facts = _facts(model)
    rope = 2 * facts.geometry.kv_heads * max(rope.dim for rope in facts.ropes)
    sizes: dict[str, Any] = {"rank": facts.geometry.hidden, "rope_dims": rope, "share": 2}
    if calibrated:
        sizes["samples"] = _TEXT // _CONTEXT
    result = _mla(model, tmp_path / "out", text if calibrated else None, **sizes)
    assert read_json(result / "config.json")["kv_source_layers"] == [0, 0, 2, 2]
    expected, actual = load(model), load(result)
    ids = _windows()[:3]  # what tokens that were never read become is not known
    # the ridge of the prediction is a millionth of the inputs' power, and some dims have little
    atol = 1e-3 if calibrated else 1e-6
    assert_close(full_logits(actual, ids), full_logits(expected, ids), atol=atol)


class _Written(nn.Module):
    """The attention of a converted layer, written out from its tensors."""

    def __init__(
        self, tensors: dict[str, Tensor], layer: int, config: dict[str, Any], held: dict[int, Any]
    ) -> None:
        super().__init__()
        self.layer, self.config, self.held = layer, config, held
        prefix = f"model.layers.{layer}.self_attn."
        self.own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        config, own, (x,) = self.config, self.own, hidden_states
        heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
        rank, planes = config["kv_lora_rank"][self.layer], config["kv_rope_planes"][self.layer]
        producer = config["kv_source_layers"][self.layer]
        width = config["head_dim"]
        angle = torch.outer(
            torch.arange(len(x)).double(), 1e4 ** (-2 * torch.tensor(planes) / width)
        )

        def turned(pairs: Tensor) -> Tensor:
            return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
                torch.ones_like(angle), angle
            )

        if producer == self.layer:
            states = x @ own["kv_a_proj_with_mqa.weight"].T + own["kv_a_proj_with_mqa.bias"]
            self.held[producer] = states[:, :rank], turned(states[:, rank:])
        else:
            assert not any(name.startswith("kv_a") for name in own)
        latent, key_rope = self.held[producer]
        query = (x @ own["q_proj.weight"].T + own["q_proj.bias"]).unflatten(-1, (heads, -1))
        up = own["kv_b_proj.weight"].unflatten(0, (heads, -1))
        scores = torch.einsum("thd,hdr,sr->hts", query[..., :nope], up[:, :nope], latent)
        asked = turned(query[..., nope:].transpose(0, 1))
        scores = scores + torch.einsum("htp,sp->hts", asked, key_rope.conj()).real
        later = torch.ones(len(x), len(x)).triu(1).bool()
        mixing = (scores * width**-0.5).masked_fill(later, -torch.inf).softmax(-1)
        found = torch.einsum("hts,sr,hvr->thv", mixing, latent, up[:, nope:]).flatten(1)
        return (found @ own["o_proj.weight"].T + own["o_proj.bias"])[None], None


@pytest.mark.parametrize("per_layer", [False, True], ids=["even", "per layer"])
@torch.no_grad()
def test_the_result_computes_the_formula(
    source: Source, tmp_path: Path, text: Path, per_layer: bool
) -> None:
    model = source("llama")
    keys = {"kv_budget": "25%", "share": 2, "layers": "1:4", "per_layer": per_layer}
    result = _mla(model, tmp_path / "out", text, refit="qo", **keys)
    config, tensors = read_json(result / "config.json"), load_file(result / "model.safetensors")
    assert config["kv_source_layers"] == [0, 1, 2, 2]
    stock, held = load(model), dict[int, Any]()
    for index, block in enumerate(stock.model.layers):
        block.self_attn = _Written(tensors, index, config, held)
    ids = random_ids(stock, 14)[:1]
    found = load(result)
    atol = 1e-9 * float(full_logits(stock, ids).abs().max())
    assert_close(full_logits(found, ids), full_logits(stock, ids), atol=atol)


_WAYS: dict[str, dict[str, Any]] = {
    "per layer": {"kv_budget": "25%", "per_layer": True},
    "share": {"kv_budget": "25%", "share": 2},
    "share three, last": {"rank": 20, "rope_dims": 8, "share": 3, "layers": "1:"},
    "both": {"kv_budget": "12.5%", "per_layer": True, "share": 2, "layers": "1:4"},
}
_SOURCES = {"share": [0, 0, 2, 2], "share three, last": [0, 1, 1, 1], "both": [0, 1, 2, 2]}

# of models that norm their keys: for each of four KV heads, or for all together
_SCALES = {"qwen3": 4, "olmo2": 1}
_CASES = [(name, way) for name in ("qwen2", "gpt2", "smollm3") for way in _WAYS]
_CASES += [(name, "per layer") for name in _SCALES]


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "text"])
@pytest.mark.parametrize(("name", "way"), _CASES)
@torch.no_grad()
def test_a_result_runs_and_caches_what_is_planned(
    source: Source, tmp_path: Path, text: Path, name: str, way: str, calibrated: bool
) -> None:
    model, keys = source(name), dict(_WAYS[way])
    if name == "gpt2" and "rope_dims" in keys:
        keys["rope_dims"] = 0
    if name == "smollm3" and keys.get("layers") in {"1:", "1:4"}:
        keys |= {"share": 2, "layers": "0:4"}  # of one kind, with positions or without
    result = _mla(model, tmp_path / "out", text if calibrated else None, **keys)
    checks = {check.name: check for check in verify_checkpoint(result, model)}
    assert {check.status for check in checks.values()} == {"ok"}, checks
    manifest, facts, found = read_manifest(result), _facts(model), load(result)
    sources = manifest["kv_cache"]["kv_source_layers"]
    if name != "smollm3":
        assert sources == _SOURCES.get(way, list(range(_LAYERS)))
    cached = DynamicCache(config=found.config)
    found(torch.full((1, 8), 5), past_key_values=cached)
    before, after = manifest["kv_cache"]["bytes_per_token"]
    assert cache_bytes(cached) == 8 * after
    own = [s for layer, s in enumerate(_sizes(result)) if sources[layer] == layer]
    numbers = sum(2 * pairs + rank + _SCALES.get(name, 0) for pairs, rank in own)
    assert after == 8 * numbers
    if "kv_budget" in keys:
        share = float(keys["kv_budget"].removesuffix("%")) / 100
        assert numbers <= budget_of(share, facts) == int(share * before / 8)
        exact = "per_layer" in keys
        assert numbers > budget_of(share, facts) - (1 if exact else len(own))
    for layer, source_layer in enumerate(sources):
        assert (cached.layers[layer].keys is None) == (source_layer != layer)


@pytest.mark.parametrize("share", [None, 2])
@torch.no_grad()
def test_each_latent_is_made_of_components_of_its_own(
    source: Source,
    tmp_path: Path,
    text: Path,
    share: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If all of a text is looked at, pairs of one plane have power one and nothing in common."""
    monkeypatch.setattr("convert.survey._EVERY", 1)
    model = source("llama")
    keys = {"rank": 20, "rope_dims": 16, "share": share, "samples": _TEXT // _CONTEXT}
    result = _mla(model, tmp_path / "out", text, target="kvpatch", **keys)
    config, tensors = read_json(result / "config.json"), load_file(result / "model.safetensors")
    stock, seen = load(model), dict[int, Tensor]()
    for index, block in enumerate(stock.model.layers):
        block.input_layernorm.register_forward_hook(
            lambda _, __, out, index=index: seen.update({index: out.flatten(0, 1)})
        )
    stock(_windows())
    producers = sorted(set(config.get("kv_source_layers") or range(_LAYERS)))
    assert producers == ([0, 2] if share else [0, 1, 2, 3])
    for layer in producers:
        down = f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa"
        key = (seen[layer] @ tensors[f"{down}.weight"].T + tensors[f"{down}.bias"])[:, 20:]
        pairs = torch.view_as_complex(key.unflatten(1, (-1, 2)).contiguous())
        planes = torch.tensor(config["kv_rope_planes"][layer])
        assert len(set(planes.tolist())) < len(planes)  # else only powers are told
        gram = pairs.mT.conj() @ pairs / len(pairs)
        together = planes[:, None] == planes
        assert_close(gram[together], torch.eye(len(planes)).to(gram)[together], atol=1e-3)


def test_layers_without_positions_cache_no_rotary_key(source: Source, tmp_path: Path) -> None:
    """Unless all layers are to be alike."""
    keys = {"kv_budget": "25%", "target": "kvpatch"}
    even = _sizes(_mla(source("smollm3"), tmp_path / "even", **keys))
    assert len(set(even)) == 1
    assert even[0][0] > 0
    own = _sizes(_mla(source("smollm3"), tmp_path / "own", per_layer=True, **keys))
    assert [pairs for pairs, _ in own[2:]] == [0, 0]


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "text"])
@pytest.mark.parametrize(
    ("name", "budget", "share"),
    [("qwen2", "30%", None), ("qwen2", "12.5%", 2), ("qwen3", "25%", None)],
)
def test_an_uneven_split_is_predicted_to_lose_no_more(
    source: Source,
    tmp_path: Path,
    text: Path,
    name: str,
    budget: str,
    share: int | None,
    calibrated: bool,
) -> None:
    model, read = source(name), text if calibrated else None
    keys: dict[str, Any] = {"kv_budget": budget, "share": share, "target": "kvpatch"}
    found = {
        uneven: _sizes(_mla(model, tmp_path / str(uneven), read, per_layer=uneven, **keys))
        for uneven in (False, True)
    }
    sources = [0, 0, 2, 2] if share else list(range(_LAYERS))
    firsts = sorted(set(sources))
    with Checkpoint(model) as checkpoint:
        looks = survey(
            checkpoint,
            _facts(model),
            sources=sources,
            tokens=_windows() if calibrated else None,
            device="cpu",
            pairs=sorted({pairs for sizes in found.values() for pairs, _ in sizes}),
            rank=_facts(model).geometry.hidden,
            selection="greedy",
            progress=lambda _: None,
        )
    lost = {
        uneven: sum(
            look.prospect.lost(*sizes[first]) for look, first in zip(looks, firsts, strict=True)
        )
        for uneven, sizes in found.items()
    }
    assert lost[True] <= lost[False] * (1 + 1e-9)
    assert found[True] != found[False]


def test_every_fourth_window_is_looked_at(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = source("llama"), _windows()
    options: dict[str, Any] = {
        "sources": list(range(_LAYERS)),
        "device": "cpu",
        "pairs": [2],
        "rank": 12,
        "selection": "greedy",
        "progress": lambda _: None,
    }
    with Checkpoint(model) as checkpoint:
        found = survey(checkpoint, _facts(model), tokens=windows, **options)
        monkeypatch.setattr("convert.survey._EVERY", 1)
        expected = survey(checkpoint, _facts(model), tokens=windows[::4], **options)
    for look, same in zip(found, expected, strict=True):
        assert_equal(look.attended.energy, same.attended.energy)
        assert_equal(look.mixture.inverse, same.mixture.inverse)
        assert look.prospect.lost(2, 12) == same.prospect.lost(2, 12)


def _windows() -> Tensor:
    """[N, T] the calibration text, all of it."""
    count = _TEXT // _CONTEXT
    return token_ids(random_text(_TEXT, seed=0))[: count * _CONTEXT].view(count, _CONTEXT)


def _error(source: Path, result: Path) -> float:
    """Squared error of the logits on the calibration text, relative."""
    ids = _windows()
    expected, actual = full_logits(load(source), ids), full_logits(load(result), ids)
    return float((actual - expected).square().sum() / expected.square().sum())


def test_refits_of_shared_latents_lose_less_on_their_text(
    source: Source, tmp_path: Path, text: Path
) -> None:
    keys: dict[str, Any] = {"rank": 20, "rope_dims": 8, "share": 2}
    errors = {}
    for refit in ("none", "q", "qo"):
        out = _mla(source("llama"), tmp_path / refit, text, refit=refit, samples=30, **keys)
        errors[refit] = _error(source("llama"), out)
        layers: Sequence[dict[str, Any]] = read_manifest(out)["layers"]
        assert all({"attention_kl", "output_error"} <= layer.keys() for layer in layers)
        assert [layer["lost_energy_shared"] > 0 for layer in layers] == [False, True] * 2
    assert errors["q"] < 0.97 * errors["none"], errors
    assert errors["qo"] < 0.85 * errors["none"], errors


def test_a_text_loses_less_than_equal_inputs(source: Source, tmp_path: Path, text: Path) -> None:
    keys: dict[str, Any] = {"rank": 40, "rope_dims": 16, "share": 2}
    blind = _mla(source("llama"), tmp_path / "blind", **keys)
    read = _mla(source("llama"), tmp_path / "read", text, **keys)
    assert _error(source("llama"), read) < _error(source("llama"), blind)
