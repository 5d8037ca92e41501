"""Decoded tokens per second of whole models of the shape of Llama-2-7B, end to end.

    python -m benchmarks.decode                        on a GPU; writes results/decode.json
    python -m benchmarks.decode --device cpu --small   proves the benchmark; writes nothing

The same model with the key-value heads that it has, and as the converter makes it: GQA-8, MQA, CLA
over pairs of layers, and MLA with a latent of 512 and a rotary key of 64. Weights and cached states
are random, because the time does not depend on them. Each is measured with so many sequences as
the cache of the first leaves room for (matched), and with so many as its own does (most).

    dynamic   transformers with its growing cache and fused attention of torch
    static    its preallocated cache, the step recorded as a CUDA graph (on the CPU: as it is)
    patched   both with ``kvpatch.patch``

On the CPU kernels run with TRITON_INTERPRET=1, else torch in their place.

The bound is the time to read weights and cache once, at the bandwidth measured in the same process.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import kvpatch
from benchmarks.designs import LLAMA, TINY, Design, designs
from benchmarks.environment import hand_over
from benchmarks.timing import Machine, arguments_of

_USED = 0.94  # of the memory that is free, for weights and cache; the rest is for activations
_WARM_UP = 3  # steps before a graph is recorded
_SPARE = 16  # tokens that a static cache has room for beyond those that are measured
# name of a way: kind of cache, and whether the model is patched
_WAYS: Mapping[str, tuple[str, bool]] = {
    "dynamic": ("dynamic", False),
    "static": ("static", False),
    "patched dynamic": ("dynamic", True),
    "patched static": ("static", True),
}


def measure(
    design: Design, model: Any, machine: Machine, *, tokens: int, batch: int, bandwidth: float
) -> dict[str, Any]:
    """All ways of a model with so many sequences of so many cached tokens.

    Args:
        design: Of the model.
        model: With its weights.
        machine: Where.
        tokens: In the cache, of each sequence.
        batch: Sequences.
        bandwidth: Bytes that it reads in a second.
    """
    # of the table of embeddings a step reads a row
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    cache = _cache_bytes(design, tokens, machine) * batch
    bound = batch * bandwidth / (weights + cache)
    found = {way: _way(model, way, tokens, batch, machine) for way in _WAYS}
    for result in found.values():
        if "refused" not in result:
            result["tokens_per_second"] = 1e3 * batch / result["median_ms"]
            result["of_bound"] = result["tokens_per_second"] / bound
    return {
        "cached_tokens": tokens,
        "batch": batch,
        "cache_bytes": cache,
        "weight_bytes": weights,
        "bound_tokens_per_second": bound,
        "ways": found,
    }


def _way(model: Any, way: str, tokens: int, batch: int, machine: Machine) -> dict[str, Any]:
    """Milliseconds of a step of one way, or why there are none."""
    kind, patched = _WAYS[way]
    put: AbstractContextManager[Any] = kvpatch.patched(model) if patched else nullcontext()
    try:
        with put as report, torch.inference_mode():
            step = _step(model, kind, tokens, batch, machine)
            found = machine.compare({way: step})[way]
    # a way that cannot is a finding, and so is one that runs out of memory
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        _free(machine)
    return {**found, "report": str(report)} if patched else found


def _step(model: Any, kind: str, tokens: int, batch: int, machine: Machine) -> Callable[[], object]:
    """What decodes one token of each sequence, and feeds itself."""
    token = torch.zeros(batch, 1, dtype=torch.long, device=machine.device)
    cache = (
        StaticCache(config=model.config, max_cache_len=tokens + machine.rounds + _SPARE)
        if kind == "static"
        else DynamicCache(config=model.config)
    )

    def step() -> None:
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    step()
    _fill(cache, tokens - 1)
    return _recorded(step) if kind == "static" and machine.is_gpu else step


def _fill(cache: Any, tokens: int) -> None:
    """Random states of so many tokens more; a layer that reads another's has none."""
    for layer in cache.layers:
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        if all(isinstance(states, Tensor) and states.numel() for states in held):
            layer.update(*(s.new_empty(*s.shape[:2], tokens, s.shape[-1]).normal_() for s in held))


def _recorded(step: Callable[[], None]) -> Callable[[], object]:
    """The step as a CUDA graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _cache_bytes(design: Design, tokens: int, machine: Machine) -> int:
    """Of one sequence, in the dtype of the model."""
    return design.cache.size(tokens) // design.cache.bytes_per_value * machine.dtype.itemsize


def _most(design: Design, tokens: int, machine: Machine) -> int:
    """How many sequences there is room for beside the weights."""
    if not machine.is_gpu:
        return 3
    free, _ = torch.cuda.mem_get_info()
    room = tokens + machine.rounds + _SPARE
    return max(1, int(_USED * free) // _cache_bytes(design, room, machine))


def _free(machine: Machine) -> None:
    gc.collect()
    if machine.is_gpu:
        torch.cuda.empty_cache()


def main() -> None:
    """Measure everything; write the result if it is of a GPU, else print it."""
    arguments = _arguments()
    dtype = getattr(torch, arguments.dtype)
    machine = Machine(arguments.device, dtype, arguments.rounds, small=arguments.small)
    ceilings = machine.ceilings()
    shape = TINY if arguments.small else LLAMA
    matched: dict[int, int] = {}
    runs = []
    for name, design in designs(shape).items():
        torch.manual_seed(0)
        with torch.device(machine.device):
            model = design.model_class._from_config(
                design.config, dtype=dtype, attn_implementation="sdpa"
            ).eval()
        for tokens in arguments.contexts or shape.contexts:
            most = _most(design, tokens, machine)
            for batch in sorted({matched.setdefault(tokens, most), most}):
                run = measure(
                    design, model, machine, tokens=tokens, batch=batch, bandwidth=ceilings.read
                )
                runs.append({"model": name, **run})
                _print(runs[-1])
        del model
        _free(machine)
    result = {
        "device": machine.name(),
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "shape": asdict(shape),
        "ceilings": asdict(ceilings),
        "runs": runs,
    }
    hand_over("decode", result, keep=machine.is_gpu and not arguments.small)


def _print(run: Mapping[str, Any]) -> None:
    head = f"{run['model']}, {run['batch']} x {run['cached_tokens']:,} cached tokens"
    print(f"{head}; bound {run['bound_tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
    for way, found in run["ways"].items():
        line = found.get("refused") or (
            f"{found['median_ms']:9.2f} ms {found['tokens_per_second']:10,.1f} tokens/s, "
            f"{100 * found['of_bound']:.0f} % of the bound"
        )
        print(f"  {way:16} {line}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", help="cached tokens of a sequence")
    return arguments_of(parser, rounds=16)


if __name__ == "__main__":
    main()
