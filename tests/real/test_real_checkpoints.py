"""Real checkpoints: exact where pooling is exact, and equal to an independent pooling elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.evaluate import evaluate_checkpoint
from convert.pipeline import convert
from convert.recipe import make_recipe
from convert.verify import verify_checkpoint
from tests.helpers import assert_equal, load_folder

WINDOWS, CONTEXT = 12, 256


def _pool(source: Path, out: Path, kv_heads: int) -> Path:
    recipe = {"method": "gqa", "kv_heads": kv_heads, "source": str(source), "output": str(out)}
    return convert(make_recipe(recipe))


def test_replicated_heads_give_back_the_published_gqa_model(
    real_data: Path, tmp_path: Path
) -> None:
    published = real_data / "models" / "stories260k-gqa"
    out = _pool(real_data / "models" / "stories260k-mha", tmp_path / "out", 4)
    ours = load_file(out / "model.safetensors")
    theirs = load_file(published / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_equal(ours[name], tensor)
    ids = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_equal(load_folder(out)(ids).logits, load_folder(published)(ids).logits)


def _pooled_in_memory(model: Any, kv_heads: int) -> Any:
    """Keep the model MHA, but give every head the mean of its group: another way to pool."""
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = projection.weight.data.double().split(layer.self_attn.head_dim)
            size = len(heads) // kv_heads
            means = [sum(heads[i : i + size]) / size for i in range(0, len(heads), size)]
            repeated = torch.cat([mean for mean in means for _ in range(size)])
            projection.weight.data = repeated.to(projection.weight.dtype)
    return model


@torch.no_grad()
def _perplexity(model: Any, folder: Path, text: Path) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), return_tensors="pt", add_special_tokens=False)["input_ids"]
    windows = ids[0, : WINDOWS * CONTEXT].view(WINDOWS, CONTEXT)
    logits = torch.cat([model(window[None]).logits[0, :-1] for window in windows])
    return math.exp(torch.nn.functional.cross_entropy(logits.double(), windows[:, 1:].flatten()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_perplexity_equals_that_of_an_independent_pooling(
    real_data: Path, tmp_path: Path, kv_heads: int
) -> None:
    source = real_data / "models" / "classics-mha-6m"
    text = real_data / "text" / "classics_valid.txt"
    out = _pool(source, tmp_path / "out", kv_heads)
    ours = evaluate_checkpoint(out, text, context=CONTEXT, samples=WINDOWS).perplexity
    expected = _perplexity(_pooled_in_memory(load_folder(source), kv_heads), source, text)
    # float32 logits of two kernels (grouped and full heads) differ by about 1e-6
    assert ours == pytest.approx(expected, rel=1e-5)
    assert ours > 1.5 * _perplexity(load_folder(source), source, text)


def test_verify_passes_on_a_real_conversion(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "models" / "classics-mha-6m"
    checks = verify_checkpoint(_pool(source, tmp_path / "out", 2), source)
    assert {check.status for check in checks} == {"ok"}, checks
