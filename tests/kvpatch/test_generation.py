"""Cached decoding and generation of converted models, on every family.

The truth is the same model without a cache, which ``test_exactness`` compares with stock models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from kvpatch.memory import KVCache, LayerCache
from tests.families.stock import Float64, full_logits, random_ids
from tests.helpers import assert_close
from tests.kvpatch.stacks import CLASSIC, MODELS, converted, pairs, stock_model

KV_HEADS = 2
_EACH = [*CLASSIC, "mistral:window"]
_OLDEST = Version(transformers.__version__) < Version("5.23")

# windows that alternate: stock models of transformers before 5.23 cannot be assisted either
_ALTERNATING = {"gemma2", "gemma3_text", "olmo3"}


@pytest.fixture
def model(name: str) -> Any:
    """A model with fewer KV heads and shared layers, in float64."""
    return converted(name, stock_model(name), KV_HEADS, pairs(name))


@torch.no_grad()
def _stepwise(model: Any, ids: Tensor, cache: Cache, step: int = 1) -> Tensor:
    with Float64():
        parts = [
            model(part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(step, dim=1)
        ]
    return torch.cat(parts, 1)


def _generate(model: Any, ids: Tensor, **how: Any) -> list[list[int]]:
    how = {"attention_mask": torch.ones_like(ids), "use_cache": True, **how}
    with Float64():
        out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **how)
    return out.tolist()


@pytest.mark.parametrize("name", _EACH)
def test_cached_decoding_is_the_full_forward(model: Any) -> None:
    ids = random_ids(model, 9)
    full = full_logits(model, ids)
    for cache, step in ((DynamicCache(), 1), (DynamicCache(config=model.config), 4)):
        assert_close(_stepwise(model, ids, cache, step), full, atol=1e-10)


# their stock model sizes the ALiBi bias by the tokens so far, and not by the static cache
_NOT_STATIC = {"falcon", "bloom"} if _OLDEST else {"falcon"}


@pytest.mark.parametrize("name", _EACH)
def test_a_static_cache_gives_the_same_logits(model: Any, name: str) -> None:
    ids = random_ids(model, 9)
    cache = StaticCache(config=model.config, max_cache_len=12)
    if name in _NOT_STATIC:
        with pytest.raises(RuntimeError, match="size of tensor"):
            _stepwise(model, ids, cache, 3)
    else:
        assert_close(_stepwise(model, ids, cache, 3), full_logits(model, ids), atol=1e-10)


@pytest.mark.parametrize("name", _EACH)
def test_readers_hold_nothing_and_the_others_what_is_planned(model: Any, name: str) -> None:
    tokens, batch = 3, 2
    sources, config = pairs(name), model.config
    width = 2 * KV_HEADS * model.get_submodule(_attention(model, 0)).head_dim
    layers = [LayerCache(width if s == i else 0) for i, s in enumerate(sources)]
    planned = KVCache(tuple(layers), bytes_per_value=8).size(tokens, batch)
    for cache in (DynamicCache(), DynamicCache(config=config)):
        _stepwise(model, random_ids(model, tokens, batch=batch), cache)
        held = [
            sum(getattr(layer, part).nbytes for part in ("keys", "values"))
            if getattr(layer, "keys", None) is not None
            else 0
            for layer in cache.layers
        ]
        assert sum(held) == planned
        assert [size > 0 for size in held] == [s == i for i, s in enumerate(sources)][: len(held)]


def _attention(model: Any, layer: int) -> str:
    return str(model.family.attention_prefix.format(layer=layer)[:-1])


@pytest.mark.parametrize("name", _EACH)
def test_left_padding_generates_the_same_tokens(model: Any) -> None:
    ids = random_ids(model, 6, batch=1)
    padded = torch.nn.functional.pad(ids, (3, 0), value=0)
    mask = (torch.arange(9) >= 3).long()[None]
    out = _generate(model, padded, attention_mask=mask)
    assert out[0][9:] == _generate(model, ids, use_cache=False)[0][6:]


@pytest.mark.parametrize("name", _EACH)
def test_beams_are_the_same_with_a_cache(model: Any) -> None:
    ids = random_ids(model, 6)
    assert _generate(model, ids, num_beams=3) == _generate(model, ids, num_beams=3, use_cache=False)


@pytest.mark.parametrize("name", _EACH)
def test_prompt_lookup_and_assistance_decode_the_same_tokens(model: Any, name: str) -> None:
    ids = random_ids(model, 4, batch=1).repeat(1, 3)  # repeats give the lookup something to find
    alone = _generate(model, ids, use_cache=False)
    assert _generate(model, ids, prompt_lookup_num_tokens=3) == alone
    assert (
        _generate(model, ids, prompt_lookup_num_tokens=3, past_key_values=DynamicCache()) == alone
    )
    if not (_OLDEST and name in _ALTERNATING):
        assert _generate(model, ids, assistant_model=stock_model(name)) == alone
        assert _generate(model, ids, assistant_model=model) == alone


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_generation_with_a_static_cache(model: Any) -> None:
    ids = random_ids(model, 6)
    out = _generate(model, ids, cache_implementation="static", disable_compile=True)
    assert out == _generate(model, ids, use_cache=False)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in _EACH])
def test_every_variant_decodes_with_a_cache(model: Any) -> None:
    ids = random_ids(model, 8)
    cache = DynamicCache(config=model.config)
    assert_close(_stepwise(model, ids, cache, 3), full_logits(model, ids), atol=1e-10)
