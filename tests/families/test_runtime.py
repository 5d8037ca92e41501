"""Exactness of conversion, rungs 6 and 7: results decode right and are as large as planned.

The truth for decoding is the same stock model without a cache and without padding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from torch import Tensor
from transformers import DynamicCache, StaticCache

from convert import make_recipe, prepare
from convert.checkpoint.reader import read_json
from convert.facts import read_facts
from tests.families.stock import Checkpoints, Conversions, Float64, full_logits, load, random_ids
from tests.families.tiny import GROUPED
from tests.helpers import assert_close, load_folder

# generation is slow: of each family one, with its windows and norms where it has a choice
_EACH = [name for name in GROUPED if ":" not in name or "window" in name or "norm" in name]

# windows that alternate, and that are full within these few tokens
_UNASSISTED = {"gemma2", "gemma3_text"}


@pytest.fixture
def model(checkpoint: Checkpoints, converted: Conversions, name: str) -> Any:
    """The conversion of a tiny model to two KV heads, in float64."""
    return load(converted(checkpoint(name), 2))


@torch.no_grad()
def _stepwise_logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of decoding with a cache, one token at a time."""
    with Float64():
        steps = [
            model(token, past_key_values=cache, use_cache=True).logits
            for token in ids.split(1, dim=1)
        ]
    return torch.cat(steps, 1)


def _generate(model: Any, ids: Tensor, **how: Any) -> list[list[int]]:
    """Twelve more tokens, without sampling."""
    with Float64():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            **how,
        )
    return out.tolist()


@pytest.mark.parametrize("name", GROUPED)
def test_cached_decoding_is_the_full_forward(model: Any, name: str) -> None:
    ids = random_ids(model, 12)
    stepwise = _stepwise_logits(model, ids, DynamicCache(config=model.config))
    assert_close(stepwise, full_logits(model, ids), atol=1e-10)


@pytest.mark.parametrize("name", _EACH)
def test_a_static_cache_gives_the_same_logits(model: Any, name: str) -> None:
    ids = random_ids(model, 12)
    stepwise = _stepwise_logits(model, ids, StaticCache(config=model.config, max_cache_len=16))
    assert_close(stepwise, full_logits(model, ids), atol=1e-10)


@pytest.mark.parametrize("name", GROUPED)
def test_left_padding_changes_nothing(model: Any, name: str) -> None:
    ids, padding = random_ids(model), 3
    padded = torch.nn.functional.pad(ids, (padding, 0), value=model.config.pad_token_id)
    mask = (torch.arange(padded.shape[1]) >= padding).long().expand_as(padded)
    positions = (torch.arange(padded.shape[1]) - padding).clamp(min=0).expand_as(padded)
    logits = full_logits(model, padded, attention_mask=mask, position_ids=positions)
    assert_close(logits[:, padding:], full_logits(model, ids), atol=1e-10)


@pytest.mark.parametrize("name", _EACH)
def test_beams_are_the_same_with_a_cache(model: Any, name: str) -> None:
    ids = random_ids(model)
    cached = _generate(model, ids, num_beams=3)
    assert cached == _generate(model, ids, num_beams=3, use_cache=False)


@pytest.mark.parametrize("name", _EACH)
def test_prompt_lookup_decodes_the_same_tokens(model: Any, name: str) -> None:
    ids = random_ids(model, 4, batch=1).repeat(1, 3)  # repeats give the lookup something to find
    drafted = _generate(model, ids, prompt_lookup_num_tokens=3)
    assert drafted == _generate(model, ids, use_cache=False)


@pytest.mark.parametrize("name", _EACH)
def test_the_source_assists_its_conversion(model: Any, checkpoint: Checkpoints, name: str) -> None:
    ids, source = random_ids(model, batch=1), load(checkpoint(name))
    if name in _UNASSISTED and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(RuntimeError, match="size of tensor"):  # the unconverted model, too
            _generate(source, ids, assistant_model=source)
        return
    assisted = _generate(model, ids, assistant_model=source)
    assert assisted == _generate(model, ids, use_cache=False)


@pytest.mark.parametrize("name", GROUPED)
def test_bytes_on_disk_are_planned(
    checkpoint: Checkpoints, converted: Conversions, name: str
) -> None:
    source = checkpoint(name)
    file = converted(source, 2) / "model.safetensors"
    with prepare(make_recipe({"method": "gqa", "kv_heads": 2, "source": str(source)})) as prepared:
        plan = prepared.plan
    with safe_open(file, "pt") as written:
        shapes = {key: tuple(written.get_slice(key).get_shape()) for key in written.keys()}  # noqa: SIM118
    (shard,) = plan.shards
    assert shapes == {spec.name: spec.shape for spec in shard.tensors}
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert plan.output_bytes == file.stat().st_size - header
    assert plan.parameters == sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", GROUPED)
def test_cache_bytes_are_planned(
    checkpoint: Checkpoints, converted: Conversions, name: str, kv_heads: int
) -> None:
    """A window of n tokens is n - 1 cached ones and the current one in transformers.

    So a windowed layer holds one token less than planned once its window is full, and the same
    as planned until then.
    """
    source = checkpoint(name)
    folder = source if kv_heads == 4 else converted(source, kv_heads)
    planned = read_facts(read_json(source / "config.json")).cache(kv_heads=kv_heads)
    model = load_folder(folder)
    for tokens in (3, 10):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(random_ids(model, tokens), past_key_values=cache)
        held = sum(_bytes(layer) for layer in cache.layers)
        current = sum(
            _bytes(layer) // layer.keys.shape[2]
            for layer in cache.layers
            if layer.is_sliding and layer.sliding_window <= tokens
        )
        assert held + current == planned.size(tokens, batch=2)


def _bytes(layer: Any) -> int:
    size: int = layer.keys.nbytes + layer.values.nbytes
    return size
