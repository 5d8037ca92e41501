"""Each fused op against what else computes the same, and against what the machine can do at most.

    python -m benchmarks.kernels                        on a GPU; writes results/kernels.json
    python -m benchmarks.kernels --device cpu --small   proves the benchmark; writes nothing

On the CPU kernels run with TRITON_INTERPRET=1, and figures mean nothing. Peers: every backend of
scaled_dot_product_attention by itself, FlexAttention compiled, and what transformers does with a
mask; for latents the absorbed form in torch, and the expanded one of the stock classes.

Ways take turns within a round, with random operands and a cold L2 cache; figures are medians.
FLOPs count the keys in sight, 2.5 times for the gradients; bytes count every operand and result
once. ``difference`` is from the first way that ran, relative to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.environment import hand_over
from benchmarks.peers import WAYS
from benchmarks.timing import Ceilings, Machine, arguments_of, difference

_GRADIENTS = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is computed.

    Args:
        op: A key of ``peers.WAYS``.
        batch: B.
        heads: H; ``kv_heads`` of them are Hkv.
        queries: T, the last tokens of the ``keys`` K.
        dim: D, or the rank R of latents; ``value_dim`` and ``rope_dim`` are Dv and Dr.
        padding: Tokens that no query sees, before the first.
        name: What the case is about.
    """

    op: str
    name: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    rope_dim: int = 0
    padding: int = 0

    @property
    def pairs(self) -> int:
        """Queries and keys that see one another, of one head."""
        first = self.keys - self.queries + 1 - self.padding
        return sum(max(0, first + t) for t in range(self.queries))

    @property
    def flops(self) -> float:
        """Of the products of queries and keys, and of weights and values."""
        product = 2 * self.batch * self.heads * self.pairs
        forward = product * (self.dim + self.rope_dim + self.value_dim)
        return forward * (_GRADIENTS if self.op == "backward" else 1)

    def bytes(self, width: int) -> int:
        """Of queries, keys, values and outputs, each once; of gradients too where they are made."""
        latent = self.op.startswith("latent")
        of_key = self.kv_heads * (self.dim + (0 if latent else self.value_dim)) + self.rope_dim
        of_query = self.heads * (self.dim + self.rope_dim + self.value_dim)
        once = width * self.batch * (self.keys * of_key + self.queries * of_query)
        return once * (2 if self.op == "backward" else 1)


def _heads(op: str, name: str, batch: int, tokens: int, keys: int, **sizes: int) -> Case:
    base = Case(
        op=op, name=name, batch=batch, heads=32, kv_heads=32, queries=tokens, keys=keys,
        dim=128, value_dim=128,
    )  # fmt: skip
    return replace(base, **sizes)


def _latent(op: str, name: str, batch: int, keys: int, heads: int) -> Case:
    sizes = {"heads": heads, "kv_heads": 1, "dim": 512, "value_dim": 512, "rope_dim": 64}
    return _heads(op, name, batch, 1, keys, **sizes)


LARGE = (
    *(_heads("forward", f"D128 causal {t}", 16384 // t, t, t) for t in (1024, 4096, 8192, 16384)),
    _heads("forward", "D64 causal", 2, 8192, 8192, dim=64, value_dim=64),
    _heads("forward", "D256 causal", 2, 8192, 8192, heads=16, kv_heads=16, dim=256, value_dim=256),
    _heads("forward", "GQA-8 causal", 2, 8192, 8192, kv_heads=8),
    _heads("forward", "GQA-8 left padding", 2, 8192, 8192, kv_heads=8, padding=1000),
    _heads("forward", "MLA 128+64", 2, 8192, 8192, rope_dim=64),
    _heads("backward", "D128 causal", 2, 8192, 8192),
    _heads("backward", "D64 causal", 2, 8192, 8192, dim=64, value_dim=64),
    _heads("backward", "GQA-8 causal", 2, 8192, 8192, kv_heads=8),
    _heads("backward", "MLA 128+64", 2, 8192, 8192, rope_dim=64),
    *(_heads("decode", f"GQA-8 {k}", 32, 1, k, kv_heads=8) for k in (1024, 8192, 32768)),
    _heads("decode", "GQA-8 one sequence", 1, 1, 8192, kv_heads=8),
    _heads("decode", "GQA-8 left padding", 32, 1, 8192, kv_heads=8, padding=1000),
    _heads("decode", "GQA-8 four tokens", 32, 4, 8192, kv_heads=8),
    _heads("decode", "GQA-4", 64, 1, 8192, kv_heads=4),
    _heads("decode", "MQA", 128, 1, 8192, kv_heads=1),
    _heads("decode", "MHA", 16, 1, 8192),
    *(_latent("latent_decode", f"MLA {h} heads", 64, 8192, h) for h in (16, 32, 64, 128)),
    _latent("latent_decode", "MLA 32 heads 32K", 64, 32768, 32),
    _latent("latent_step", "MLA step", 16, 8192, 32),
)
_TINY = {"heads": 4, "kv_heads": 2, "dim": 16, "value_dim": 16}
SMALL = (
    _heads("forward", "causal", 2, 32, 32, **_TINY),
    _heads("forward", "left padding", 2, 32, 32, padding=5, **_TINY),
    _heads("forward", "rotary part apart", 2, 32, 32, rope_dim=16, **_TINY),
    _heads("backward", "causal", 2, 32, 32, **_TINY),
    _heads("backward", "rotary part apart", 2, 32, 32, rope_dim=16, **_TINY),
    _heads("decode", "one token", 2, 1, 64, **_TINY),
    _heads("decode", "four tokens", 2, 4, 64, **_TINY),
    _heads("decode", "left padding", 2, 1, 64, padding=7, **_TINY),
    *(
        replace(_latent(op, "latents", 2, 64, 4), dim=32, value_dim=32, rope_dim=16)
        for op in ("latent_decode", "latent_step")
    ),
)


def measure(case: Case, machine: Machine, ceilings: Ceilings) -> dict[str, Any]:
    """Times of all ways of a case, and what they come to.

    Args:
        case: What is computed.
        machine: Where.
        ceilings: Of the machine.
    """
    torch.manual_seed(0)
    ways: Mapping[str, Callable[[], Any]] = WAYS[case.op](case, machine)
    found = machine.compare(ways)
    able = [name for name in ways if "refused" not in found[name]]
    expected = None
    for name in able:
        seconds = found[name]["median_ms"] / 1e3
        speed, traffic = case.flops / seconds, case.bytes(machine.dtype.itemsize) / seconds
        outputs = ways[name]()
        expected = outputs if expected is None else expected
        found[name] |= {
            "tflops": speed / 1e12,
            "gb_per_s": traffic / 1e9,
            "of_matmul": speed / ceilings.matmul,
            "of_copy": traffic / ceilings.copy,
            "of_read": traffic / ceilings.read,
            "difference": difference(outputs, expected),
        }
    return {**asdict(case), "ways": found}


def main() -> None:
    """Measure everything; write the result if it is of a GPU, else print it."""
    arguments = _arguments()
    dtype = getattr(torch, arguments.dtype)
    machine = Machine(arguments.device, dtype, arguments.rounds, small=arguments.small)
    ceilings = machine.ceilings()
    chosen = [
        case
        for case in (SMALL if arguments.small else LARGE)
        if arguments.only in f"{case.op} {case.name}"
    ]
    cases = []
    for case in chosen:
        cases.append(measure(case, machine, ceilings))
        _print(cases[-1])
    result = {
        "device": machine.name(),
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "ceilings": asdict(ceilings),
        "cases": cases,
    }
    hand_over("kernels", result, keep=machine.is_gpu and not arguments.small and not arguments.only)


def _print(case: Mapping[str, Any]) -> None:
    print(f"{case['op']}: {case['name']}", file=sys.stderr)
    for name, found in case["ways"].items():
        line = found.get("refused") or (
            f"{found['median_ms']:9.3f} ms {found['tflops']:8.1f} TFLOPS {found['gb_per_s']:8.1f} "
            f"GB/s, {100 * found['of_copy']:.0f} % of copy, difference {found['difference']:.1e}"
        )
        print(f"  {name:24} {line}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose op and name contain this")
    return arguments_of(parser, rounds=30)


if __name__ == "__main__":
    main()
