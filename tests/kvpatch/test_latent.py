"""Latent attention in every family: the stock model it was made of is the truth, to 1e-10."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from convert.targets.latent import latent_class
from kvpatch.memory import latent_cache
from kvpatch.models import FAMILIES, latent_kvpatch
from tests.families import tiny
from tests.families.stock import Float64, full_logits, load, make, random_ids
from tests.helpers import assert_close
from tests.kvpatch.latents import CLAMPED, EACH, ELIGIBLE, SHIFTED, latent_model
from tests.kvpatch.stacks import ReadingCache, pairs, stock_model

# a model by name; its layers share latents if asked for
Latents = Callable[..., Any]

_OLDEST = Version(transformers.__version__) < Version("5.23")

# their stock model sizes the ALiBi bias by the tokens so far, and not by the static cache
_NOT_STATIC = {"falcon", "bloom"} if _OLDEST else {"falcon"}

# their stock stacks make masks for attention that is written out, or cap its scores
_EAGER_ONLY = {"bloom", "codegen", "gemma2", "gpt_neo", "gptj", "mpt"}


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    @cache
    def model(name: str, shared: bool = False) -> Any:
        folder = tmp_path_factory.mktemp(name.replace(":", "-"))
        return latent_model(name, stock_model(name), folder, pairs(name) if shared else None)

    return model


@pytest.fixture(params=["expanded", "absorbed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One of the two forms wherever both are possible; checks that it was the one in use."""
    calls = _count_absorbed(monkeypatch)
    absorbed = request.param == "absorbed"
    monkeypatch.setattr(latent_kvpatch, "prefers_absorbed", lambda *_, **__: absorbed)
    yield request.param
    assert bool(calls) == absorbed


def _count_absorbed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Query tokens of every call of the absorbed form."""
    calls: list[int] = []
    real = latent_kvpatch.absorbed_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(query.shape[2])
        return real(query, *args, **kwargs)

    monkeypatch.setattr(latent_kvpatch, "absorbed_attention", counted)
    return calls


@cache
def _truth(name: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and logits of the stock model."""
    stock = stock_model(name)
    ids = random_ids(stock, tokens)
    return ids, full_logits(stock, ids)


@torch.no_grad()
def _stepwise(model: Any, ids: Tensor, past: Cache, steps: int | list[int] = 1) -> Tensor:
    with Float64():
        parts = [
            model(part, past_key_values=past, use_cache=True).logits
            for part in ids.split(steps, dim=1)
        ]
    return torch.cat(parts, 1)


def _generate(model: Any, ids: Tensor, **how: Any) -> list[list[int]]:
    how = {"attention_mask": torch.ones_like(ids), "use_cache": True, **how}
    with Float64():
        out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **how)
    return out.tolist()  # type: ignore[no-any-return]


def test_every_family_is_here() -> None:
    assert {tiny.family(name) for name in EACH} == set(FAMILIES)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", ELIGIBLE)
def test_all_tokens_at_once(latent: Latents, name: str) -> None:
    ids, want = _truth(name, 9)
    assert_close(full_logits(latent(name), ids), want, atol=1e-10)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", ELIGIBLE)
def test_decoding_with_a_cache(latent: Latents, name: str) -> None:
    model = latent(name)
    ids, want = _truth(name, 9)
    assert_close(_stepwise(model, ids, DynamicCache()), want, atol=1e-10)
    assert_close(_stepwise(model, ids, DynamicCache(config=model.config), 4), want, atol=1e-10)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", [name for name in EACH if name not in _NOT_STATIC])
def test_decoding_with_a_static_cache(latent: Latents, name: str) -> None:
    model = latent(name)
    ids, want = _truth(name, 9)
    past = StaticCache(config=model.config, max_cache_len=12)
    assert_close(_stepwise(model, ids, past, [4, 1, 1, 3]), want, atol=1e-10)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", EACH)
def test_left_padding(latent: Latents, name: str) -> None:
    ids, _ = _truth(name, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    want = full_logits(stock_model(name), ids, attention_mask=mask)
    have = full_logits(latent(name), ids, attention_mask=mask)
    assert_close(have[0], want[0], atol=1e-10)
    assert_close(have[1, 3:], want[1, 3:], atol=1e-10)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", ELIGIBLE)
def test_layers_that_read_the_latents_of_another(latent: Latents, name: str) -> None:
    """The stock model shares by a cache that hands keys and values to the readers."""
    ids, alone = _truth(name, 9)
    stock, model, sources = stock_model(name), latent(name, shared=True), pairs(name)
    with torch.no_grad(), Float64():
        past = ReadingCache(sources, stock.config)
        want = stock(ids, past_key_values=past, use_cache=True).logits
    assert float((want - alone).abs().max()) > 1e-3, "sharing changed nothing"
    assert_close(full_logits(model, ids), want, atol=1e-10)
    for past in (DynamicCache(), DynamicCache(config=model.config)):
        assert_close(_stepwise(model, ids, past, [5, 1, 1, 2]), want, atol=1e-10)
    if name in EACH and name not in _NOT_STATIC:
        past = StaticCache(config=model.config, max_cache_len=12)
        assert_close(_stepwise(model, ids, past, [5, 1, 1, 2]), want, atol=1e-10)


@pytest.mark.parametrize("name", EACH)
def test_generation_gives_the_tokens_of_the_source(latent: Latents, name: str) -> None:
    model, stock = latent(name), stock_model(name)
    ids, _ = _truth(name, 6)
    greedy = _generate(stock, ids)
    assert _generate(model, ids) == greedy
    assert _generate(model, ids, num_beams=3) == _generate(stock, ids, num_beams=3)
    if name not in _NOT_STATIC:
        static = {"cache_implementation": "static", "disable_compile": True}
        assert _generate(model, ids, **static) == greedy


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_a_prompt_in_chunks_fills_a_static_cache(latent: Latents, name: str) -> None:
    """Such a cache is sized before it is written to, unless the config says it cannot be."""
    ids, _ = _truth(name, 6)
    chunks = {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 4}
    assert _generate(latent(name), ids, **chunks) == _generate(stock_model(name), ids)


@pytest.mark.parametrize("name", EACH)
def test_drafts_are_taken_back(latent: Latents, name: str) -> None:
    """Prompt lookup crops the cache; layers that read another's have nothing to crop."""
    ids = _truth(name, 4)[0][:1].repeat(1, 3)
    for shared in (False, True):
        model = latent(name, shared=shared)
        alone = _generate(model, ids, use_cache=False)
        assert _generate(model, ids, prompt_lookup_num_tokens=3) == alone


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", [name for name in EACH if name not in _EAGER_ONLY])
def test_fused_attention(latent: Latents, name: str) -> None:
    """It hides what comes later without a mask, which the absorbed form would not."""
    model = latent(name)
    ids, want = _truth(name, 9)
    model.set_attn_implementation("sdpa")
    try:
        assert_close(full_logits(model, ids), want, atol=1e-10)
        past = DynamicCache(config=model.config)
        assert_close(_stepwise(model, ids, past, [5, 1, 1, 2]), want, atol=1e-10)
        if name not in _NOT_STATIC:
            past = StaticCache(config=model.config, max_cache_len=12)
            assert_close(_stepwise(model, ids, past, [5, 1, 1, 2]), want, atol=1e-10)
    finally:
        model.set_attn_implementation("eager")


def test_decoding_is_absorbed_and_training_is_not(
    latent: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _count_absorbed(monkeypatch)
    model = latent("llama")
    ids = random_ids(model, 6)
    _stepwise(model, ids, DynamicCache(), [5, 1])
    assert calls[-4:] == [1] * 4
    calls.clear()
    model.train()
    _stepwise(model, ids, DynamicCache(), [5, 1])
    model.eval()
    assert not calls


_SCALED = [
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 500.0,
        "original_max_position_embeddings": 16,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 500.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


@pytest.mark.parametrize("rope", _SCALED, ids=lambda rope: rope["rope_type"])
def test_scaled_tables_and_grouped_heads(tmp_path: Path, rope: dict[str, Any]) -> None:
    """The table is that of the stock model, with the attention factor of yarn in it."""
    settings = {**tiny.settings("llama"), "num_key_value_heads": 2, "rope_parameters": rope}
    make("llama", settings).save_pretrained(tmp_path / "stock")
    stock = load(tmp_path / "stock")
    model = latent_model("llama", stock, tmp_path)
    ids = random_ids(stock, 12)
    want = full_logits(stock, ids)
    assert_close(full_logits(model, ids), want, atol=1e-10)
    assert_close(_stepwise(model, ids, DynamicCache()), want, atol=1e-10)


# of four KV heads, or of all together
_SCALES = {"qwen3": 4, "gemma3_text": 4, "olmo2": 1, "olmo3": 1}
_SCALES |= {"stablelm:norm-bias": 4, "cohere:norm-bias-untied": 4}


@pytest.mark.parametrize("name", EACH)
def test_the_cache_holds_what_is_planned(latent: Latents, name: str) -> None:
    tokens, batch = 3, 2
    for shared in (False, True):
        model = latent(name, shared=shared)
        config = model.config
        planned = latent_cache(
            layers=config.num_hidden_layers,
            rank=config.kv_lora_rank,
            rope_dim=[2 * len(planes) for planes in config.kv_rope_planes],
            scales=_SCALES.get(name, 0),
            sources=config.kv_source_layers,
            bytes_per_value=8,
        )
        assert len(set(config.kv_lora_rank)) > 1
        past = DynamicCache(config=config)
        _stepwise(model, random_ids(model, tokens, batch=batch), past)
        held = [
            sum(getattr(layer, part).nbytes for part in ("keys", "values"))
            if getattr(layer, "keys", None) is not None
            else 0
            for layer in past.layers
        ]
        assert held == [8 * batch * tokens * layer.values for layer in planned.layers]
        assert sum(held) == planned.size(tokens, batch)


@pytest.mark.parametrize("name", SHIFTED + CLAMPED)
def test_no_target_for_norms_with_a_bias_and_clamps(tmp_path: Path, name: str) -> None:
    stock_model(name).save_pretrained(tmp_path)
    facts = read_facts(read_json(tmp_path / "config.json"))
    assert _target(facts) is None


def test_no_target_for_experts(tmp_path: Path) -> None:
    make("mixtral", tiny.settings("mixtral")).save_pretrained(tmp_path)
    assert _target(read_facts(read_json(tmp_path / "config.json"))) is None


def _target(facts: Any) -> Any:
    count = facts.layers
    return latent_class(
        facts,
        ranks=[8] * count,
        planes=[[0]] * count,
        nope_dim=4,
        value_dim=4,
        kv_source_layers=None,
    )
