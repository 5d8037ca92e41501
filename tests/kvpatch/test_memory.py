"""KV cache formulas against published numbers and against counting by hand."""

from __future__ import annotations

import pytest

from kvpatch.memory import KVCache, LayerCache, format_bytes, latent_cache, multi_head_cache

DIMS = {"layers": 61, "head_dim": 128}


@pytest.mark.parametrize(
    ("cache", "per_token", "in_all"),
    [
        (multi_head_cache(kv_heads=128, **DIMS), "4.00 MB", "400 GB"),
        (multi_head_cache(kv_heads=16, **DIMS), "500 kB", "50.0 GB"),
        (multi_head_cache(kv_heads=1, **DIMS), "31.2 kB", "3.12 GB"),
        (latent_cache(layers=61, rank=512, rope_dim=64), "70.3 kB", "7.03 GB"),
    ],
    ids=["MHA", "GQA-16", "MQA", "MLA-512+64"],
)
def test_published_table_of_a_61_layer_model(cache: KVCache, per_token: str, in_all: str) -> None:
    assert format_bytes(cache.bytes_per_token) == per_token
    assert format_bytes(cache.size(tokens=100_000)) == in_all


def test_multi_head_cache_is_keys_and_values_of_every_layer_head_and_token() -> None:
    cache = multi_head_cache(layers=3, kv_heads=2, head_dim=5, value_dim=7, bytes_per_value=4)
    assert cache.size(tokens=11, batch=13) == 3 * 2 * (5 + 7) * 11 * 13 * 4


@pytest.mark.parametrize(("share", "producers"), [(1, 7), (2, 4), (3, 3), (7, 1)])
def test_shared_layers_store_nothing(share: int, producers: int) -> None:
    sources = [layer - layer % share for layer in range(7)]
    cache = multi_head_cache(layers=7, kv_heads=2, head_dim=4, sources=sources)
    assert cache.bytes_per_token == producers * 2 * (4 + 4) * 2
    assert cache.layers[0].values > 0


def test_a_shared_set_is_kept_for_its_widest_reader() -> None:
    windows = [4, None, 4, 8, 4]
    sources = [0, 0, 2, 2, 4]
    cache = multi_head_cache(layers=5, kv_heads=1, head_dim=1, sources=sources, windows=windows)
    assert [layer.window for layer in cache.layers if layer.values] == [None, 8, 4]
    assert cache.size(100) == 2 * 2 * (100 + 8 + 4)


def test_latents_have_windows_too() -> None:
    cache = latent_cache(layers=2, rank=3, rope_dim=2, windows=[4, None])
    assert cache.size(10) == 2 * 5 * (4 + 10)


def test_scales_of_keys_are_beside_every_latent_that_is_cached() -> None:
    sizes = {"layers": 3, "rank": [3, 3, 5], "rope_dim": 2, "sources": [0, 0, 2]}
    cache = latent_cache(**sizes, scales=4)
    assert [layer.values for layer in cache.layers] == [9, 0, 11]


def test_latents_of_each_layer_and_those_that_layers_read() -> None:
    cache = latent_cache(
        layers=4,
        rank=[3, 3, 5, 7],
        rope_dim=[2, 2, 0, 4],
        sources=[0, 0, 2, 3],
        windows=[4, None, 8, None],
    )
    assert [layer.values for layer in cache.layers] == [5, 0, 5, 11]
    assert cache.size(10) == 2 * (5 * 10 + 5 * 8 + 11 * 10)
    with pytest.raises(ValueError, match="zip"):
        latent_cache(layers=2, rank=[3], rope_dim=2)


@pytest.mark.parametrize("tokens", [1, 4, 5, 100])
def test_windows_stop_growing(tokens: int) -> None:
    cache = KVCache((LayerCache(10), LayerCache(10, window=4)), bytes_per_value=2)
    counted = sum(2 * 10 + (2 * 10 if position < 4 else 0) for position in range(tokens))
    assert cache.size(tokens) == counted


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1000, "1.00 kB"),
        (31_232, "31.2 kB"),
        (999_600, "1.00 MB"),
        (70_272, "70.3 kB"),
        (5_000_000_000_000_000, "5000 TB"),
    ],
)
def test_format_bytes_keeps_three_digits(size: float, text: str) -> None:
    assert format_bytes(size) == text
