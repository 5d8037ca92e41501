"""What one decoded token costs in absorbed form.

    OMP_WAIT_POLICY=passive python -m benchmarks.absorbed

Passive, because threads that spin at a barrier take the core from the one that they wait for where
other programs run too; then two threads are slower than one, in every way.

Three ways, on 4096 cached tokens, in float32 on the CPU:

    stock     DeepseekV3 as transformers has it: all cached latents are expanded at every step
    absorbed  the same model with ``kvpatch.patch``
    llama     the multi-head Llama of the same hidden size and heads, with fused attention

The ways take turns, in an order that rotates; the ratios are medians of the ratios within a round,
so that a machine that slows down for a while slows all of them down. With one thread the processor
time is measured too, which other programs hardly touch. Hooks on the attention modules give their
share of every step. The weights are random, because the time does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DeepseekV3Config,
    DynamicCache,
    LlamaConfig,
    StaticCache,
)

import kvpatch
from benchmarks.environment import environment, write_result
from kvpatch.memory import latent_cache, multi_head_cache

STOCK, ABSORBED, LLAMA = "stock", "absorbed", "llama"
WAYS = (STOCK, ABSORBED, LLAMA)
HEADS, HEAD_DIM, RANK, ROPE_DIM = 16, 64, 256, 32
PARTS = ("whole", "attention_only")
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
# what is asked of the ratios
AT_LEAST_FASTER, AT_MOST_OF_LLAMA = 3.0, 0.8

# milliseconds by clock and part
Sample = Mapping[str, Mapping[str, float]]


def main() -> None:
    """Measure, write ``results/absorbed.json`` and print a table."""
    arguments = _arguments()
    facts = environment()
    models = _models(arguments.layers)
    difference = _difference(models[STOCK])
    runs = [
        measure(models, kind, threads, arguments)
        for kind in ("dynamic", "static")
        for threads in arguments.threads
    ]
    result = {
        **facts,
        "conditions": {
            "model": "hidden 1024, intermediate 2816, 16 heads, vocabulary 4096, float32, random",
            "latent": {"rank": RANK, "rope": ROPE_DIM, "nope": HEAD_DIM, "value": HEAD_DIM},
            "llama_head_dim": HEAD_DIM,
            "attention": "sdpa",
            "layers": arguments.layers,
            "cached_tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "order": "the ways take turns within a round; ratios are medians over the rounds",
            "unit": "milliseconds per decoded token",
            "whole": "forward of the model, with MLP and output layer",
            "attention_only": "its attention modules: projections, cache update, attention",
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "clocks": "wall: elapsed; cpu: of the thread, where it is the only one",
            "note": arguments.note,
        },
        "kv_bytes_per_token": _kv_bytes(arguments.layers),
        "largest_logit_difference": difference,
        "runs": runs,
    }
    path = write_result("absorbed", result)
    _print_table(runs)
    print(f"written to {path}")


def measure(
    models: Mapping[str, Any], kind: str, threads: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All rounds with one kind of cache and one number of threads."""
    torch.set_num_threads(threads)
    rounds = arguments.rounds
    caches = {way: _filled(models[way].config, kind, arguments.tokens, rounds + 1) for way in WAYS}
    samples: list[dict[str, Sample]] = []
    for number in range(rounds + 1):
        turn = number % len(WAYS)
        order = WAYS[turn:] + WAYS[:turn]
        samples.append({way: _step(models[way], caches[way], way) for way in order})
    measured = samples[1:]  # the first round warms up
    return {
        "cache": kind,
        "threads": threads,
        **{
            clock: {part: _summary(measured, clock, part) for part in PARTS}
            for clock in (CLOCKS if threads == 1 else ("wall",))
        },
        "samples": measured,
    }


def _summary(samples: Sequence[Mapping[str, Sample]], clock: str, part: str) -> dict[str, Any]:
    """Medians of the ways, and the two ratios with what is asked of them."""
    times = {way: [sample[way][clock][part] for sample in samples] for way in WAYS}

    def ratio(above: str, below: str) -> float:
        return median(a / b for a, b in zip(times[above], times[below], strict=True))

    faster, of_llama = ratio(STOCK, ABSORBED), ratio(ABSORBED, LLAMA)
    return {
        "median_ms": {way: median(values) for way, values in times.items()},
        "least_ms": {way: min(values) for way, values in times.items()},
        "stock_by_absorbed": faster,
        "absorbed_by_llama": of_llama,
        "met": faster >= AT_LEAST_FASTER and of_llama <= AT_MOST_OF_LLAMA,
    }


@torch.inference_mode()
def _step(model: Any, cache: Cache, way: str) -> Sample:
    """Milliseconds of decoding one token, the whole and the attention modules in it."""
    token = torch.tensor([[7]])
    patched: AbstractContextManager[Any] = (
        kvpatch.patched(model, strict=True) if way == ABSORBED else nullcontext()
    )
    with patched, _attention_seconds(model) as attention:
        start = _now()
        model(token, past_key_values=cache, use_cache=True)
        whole = _since(start)
    if isinstance(cache, DynamicCache):
        cache.crop(-1)
    return {
        clock: {
            "whole": 1e3 * whole[clock],
            "attention_only": 1e3 * sum(call[clock] for call in attention),
        }
        for clock in CLOCKS
    }


@contextmanager
def _attention_seconds(model: Any) -> Iterator[list[Mapping[str, float]]]:
    """Seconds of each call of an attention module, by clock."""
    seconds: list[Mapping[str, float]] = []
    started: list[Mapping[str, float]] = []
    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.self_attn.register_forward_pre_hook(lambda *_: started.append(_now())),
            layer.self_attn.register_forward_hook(lambda *_: seconds.append(_since(started.pop()))),
        ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _now() -> Mapping[str, float]:
    return {name: clock() for name, clock in CLOCKS.items()}


def _since(start: Mapping[str, float]) -> Mapping[str, float]:
    return {name: clock() - start[name] for name, clock in CLOCKS.items()}


def _models(layers: int) -> dict[str, nn.Module]:
    """The model of each way; stock and absorbed are one."""
    sizes = {
        "vocab_size": 4096,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 8192,
    }
    latent = DeepseekV3Config(
        **sizes,
        q_lora_rank=None,
        kv_lora_rank=RANK,
        qk_rope_head_dim=ROPE_DIM,
        qk_nope_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        first_k_dense_replace=layers,
    )
    torch.manual_seed(0)
    make: Callable[..., Any] = AutoModelForCausalLM.from_config
    stock = make(latent, attn_implementation="sdpa").eval()
    llama = make(LlamaConfig(**sizes), attn_implementation="sdpa").eval()
    return {STOCK: stock, ABSORBED: stock, LLAMA: llama}


def _filled(config: Any, kind: str, tokens: int, steps: int) -> Cache:
    """A cache that holds random states of ``tokens`` tokens, with room for ``steps`` more."""
    static = kind == "static"
    cache = (
        StaticCache(config=config, max_cache_len=tokens + steps)
        if static
        else DynamicCache(config=config)
    )
    for layer in range(config.num_hidden_layers):
        cache.update(*_random_states(config, tokens), layer)
    return cache


def _random_states(config: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """What the cache of one layer holds."""
    if isinstance(config, DeepseekV3Config):
        return torch.randn(1, 1, tokens, RANK), torch.randn(1, 1, tokens, ROPE_DIM)
    keys, values = torch.randn(2, 1, HEADS, tokens, HEAD_DIM)
    return keys, values


@torch.inference_mode()
def _difference(model: Any) -> float:
    """Largest difference of a logit between stock and absorbed form over 16 decoded tokens."""
    ids = torch.randint(model.config.vocab_size, (1, 144))

    def logits() -> Tensor:
        cache = DynamicCache(config=model.config)
        model(ids[:, :128], past_key_values=cache)
        steps = [model(token, past_key_values=cache).logits for token in ids[:, 128:].split(1, 1)]
        return torch.cat(steps, 1)

    stock = logits()
    with kvpatch.patched(model, strict=True):
        return float((logits() - stock).abs().max())


def _kv_bytes(layers: int) -> dict[str, int]:
    latent = latent_cache(layers=layers, rank=RANK, rope_dim=ROPE_DIM, bytes_per_value=4)
    heads = multi_head_cache(layers=layers, kv_heads=HEADS, head_dim=HEAD_DIM, bytes_per_value=4)
    return {"latent": latent.bytes_per_token, "llama": heads.bytes_per_token}


def _print_table(runs: Sequence[Mapping[str, Any]]) -> None:
    head = f"{'cache':8} threads clock {'part':15}" + "".join(f"{way:>10}" for way in WAYS)
    print(head + "   stock/absorbed  absorbed/llama")
    for run in runs:
        for clock, part in product((c for c in CLOCKS if c in run), PARTS):
            summary = run[clock][part]
            times = "".join(f"{summary['median_ms'][way]:10.2f}" for way in WAYS)
            ratios = f"{summary['stock_by_absorbed']:17.2f}{summary['absorbed_by_llama']:16.2f}"
            print(f"{run['cache']:8} {run['threads']:7} {clock:5} {part:15}{times}{ratios}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="cached tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--note", help="what else there is to say, such as other load")
    return parser.parse_args()


if __name__ == "__main__":
    main()
