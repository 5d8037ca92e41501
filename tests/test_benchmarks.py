"""The benchmarks of the kernels: what they count, and that they run where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import kvpatch
from benchmarks import decode, kernels
from benchmarks.designs import LLAMA, TINY, designs
from benchmarks.timing import Machine, difference
from kvpatch.errors import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def machine() -> Machine:
    return Machine("cpu", torch.float32, 3, small=True)


def _small(module: str) -> dict[str, Any]:
    """What a benchmark prints with ``--device cpu --small``."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--device", "cpu", "--small"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def test_every_kernel_is_compared_with_what_gives_the_same() -> None:
    cases = _small("kernels")["cases"]
    assert {case["op"] for case in cases} == {case.op for case in kernels.LARGE}
    for case in cases:
        able = {name: way for name, way in case["ways"].items() if "refused" not in way}
        assert next(iter(able)) == "kvpatch", case["ways"]
        assert len(able) > 1
        assert all(way["difference"] < 1e-5 for way in able.values()), case
        assert all(way["median_ms"] > 0 for way in able.values())


def _can_be_patched(name: str) -> bool:
    design = designs(TINY)[name]
    try:
        kvpatch.patch(design.model_class._from_config(design.config))
    except UsageError:
        return False
    return True


def test_every_design_is_decoded_in_every_way() -> None:
    runs = _small("decode")["runs"]
    assert [run["model"] for run in runs] == list(designs(TINY))
    for run in runs:
        ways = run["ways"]
        assert ways.keys() == {"dynamic", "static", "patched dynamic", "patched static"}
        able = {name for name, found in ways.items() if "refused" not in found}
        assert able == (ways.keys() if _can_be_patched(run["model"]) else {"dynamic", "static"})
        for name in able:
            found = ways[name]
            rate = 1e3 * run["batch"] / found["median_ms"]
            assert found["tokens_per_second"] == pytest.approx(rate)
            assert found["of_bound"] == pytest.approx(rate / run["bound_tokens_per_second"])


@pytest.mark.parametrize("padding", [0, 3, 9])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 8)])
def test_work_counts_what_is_in_sight(queries: int, keys: int, padding: int) -> None:
    case = kernels.Case(
        op="decode", name="", batch=2, heads=4, kv_heads=2, queries=queries, keys=keys,
        dim=8, value_dim=6, padding=padding,
    )  # fmt: skip
    seen = sum(padding <= n <= t for t in range(keys - queries, keys) for n in range(keys))
    assert case.pairs == seen
    assert case.flops == 2 * 4 * seen * 2 * (8 + 6)


def test_bytes_of_latents_are_counted_once() -> None:
    """512 and 64 numbers of a key, which is the value too; no more than one head has them."""
    case = next(case for case in kernels.LARGE if case.op == "latent_decode")
    cache = case.batch * case.keys * (512 + 64)
    queries = case.batch * case.heads * (512 + 64 + 512)
    assert case.bytes(2) == 2 * (cache + queries)


def test_ways_take_turns_and_a_refusal_is_a_finding(machine: Machine) -> None:
    called: list[str] = []

    def unable() -> None:
        raise RuntimeError("not on this device\nand more")

    found = machine.compare(
        {"a": lambda: called.append("a"), "b": unable, "c": lambda: called.append("c")}
    )
    assert called == ["a", "c", "a", "c", "c", "a", "a", "c"]  # the first two warm up
    assert found["b"] == {"refused": "RuntimeError: not on this device"}
    assert list(found) == ["a", "b", "c"]
    assert found["a"]["p20_ms"] <= found["a"]["median_ms"] <= found["a"]["p80_ms"]


def test_differences_are_relative_and_the_largest() -> None:
    ones = torch.ones(10)
    assert difference([ones, 1.5 * ones], [ones, ones]) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", list(designs(TINY)))
def test_the_cache_holds_what_is_said(name: str, kind: str, machine: Machine) -> None:
    """Steps decode against the asked number of tokens, in as many bytes as are told."""
    design = designs(TINY)[name]
    model = design.model_class._from_config(design.config, dtype=torch.float32).eval()
    seen: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["past_key_values"]), with_kwargs=True
    )
    with torch.inference_mode():
        step = decode._step(model, kind, 20, 2, machine)
        cache = seen[-1]
        assert isinstance(cache, StaticCache if kind == "static" else DynamicCache)
        assert int(cache.get_seq_length()) == 20
        step()
        assert int(cache.get_seq_length()) == 21
    handle.remove()
    if kind == "dynamic":
        held = sum(
            states.nbytes
            for layer in cache.layers
            for states in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if states is not None
        )
        assert held == 2 * decode._cache_bytes(design, 21, machine)


def test_the_large_shape_is_that_of_llama_2_7b() -> None:
    """Bytes per token in bfloat16: 512 KiB of keys and values; 36 KiB of latents."""
    sizes = {name: design.cache.bytes_per_token for name, design in designs(LLAMA).items()}
    kib = {"MHA": 512, "GQA-8": 128, "MQA": 16, "CLA2": 256, "MLA 512+64": 36}
    assert sizes == {name: 1024 * size for name, size in kib.items()}
