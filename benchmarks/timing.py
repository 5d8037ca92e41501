"""Timing of ways to compute the same, which take turns, and of the most a machine can do."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

__all__ = ["Ceilings", "Machine", "Way", "arguments_of", "difference"]

Way = Callable[[], Any]

_FLUSHED = 512 << 20  # bytes, several times the L2 cache of any GPU
_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most that was measured on a machine, in this process.

    Args:
        copy: Bytes per second, read and written ones both counted.
        read: Bytes per second.
        matmul: Floating-point operations per second of a large matrix product.
    """

    copy: float
    read: float
    matmul: float


class Machine:
    """A device and its clock.

    Args:
        device: ``cuda``, or ``cpu`` to prove a benchmark where there is no GPU.
        dtype: Of what is computed with.
        rounds: Of each measurement.
        small: Whether sizes are those of a proof.
    """

    def __init__(self, device: str, dtype: torch.dtype, rounds: int, *, small: bool) -> None:
        self.device = device
        self.dtype = dtype
        self.rounds = rounds
        self.small = small
        flushed = _FLUSHED if self.is_gpu else 1
        self._flushed = torch.empty(flushed, dtype=torch.int8, device=device)

    @property
    def is_gpu(self) -> bool:
        """Whether events on the device tell the time."""
        return torch.device(self.device).type == "cuda"

    def name(self) -> str:
        """Of the device."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else self.device

    def random(self, *shape: int) -> Tensor:
        """Normal numbers, since zeros take less power and run faster."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def compare(self, ways: Mapping[str, Way]) -> dict[str, dict[str, Any]]:
        """Time ways in turns, in an order that rotates.

        Args:
            ways: What to call, by name.

        Returns:
            For each way ``median_ms``, ``p20_ms`` and ``p80_ms``; ``refused``, with the reason,
            where it raised at its first call.
        """
        found: dict[str, dict[str, Any]] = {}
        able: list[str] = []
        for name, way in ways.items():
            try:
                for _ in range(_WARM_UP if self.is_gpu else 1):
                    way()
            # backends say no in many ways, and one that cannot is a finding
            except Exception as error:
                found[name] = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            else:
                able.append(name)
        samples: dict[str, list[float]] = {name: [] for name in able}
        for number in range(self.rounds if able else 0):
            turn = number % len(able)
            for name in (*able[turn:], *able[:turn]):
                samples[name].append(self._milliseconds(ways[name]))
        return {name: found.get(name) or _summary(samples[name]) for name in ways}

    def ceilings(self) -> Ceilings:
        """Copy, read and multiply large random matrices."""
        side = 64 if self.small else 8192
        left, right = self.random(side, side), self.random(side, side)
        source = self.random(1 << (12 if self.small else 30))
        target = torch.empty_like(source)
        times = self.compare(
            {
                "copy": lambda: target.copy_(source),
                "read": source.amax,
                "matmul": lambda: left @ right,
            }
        )
        seconds = {name: found["median_ms"] / 1e3 for name, found in times.items()}
        return Ceilings(
            copy=2 * source.nbytes / seconds["copy"],
            read=source.nbytes / seconds["read"],
            matmul=2 * side**3 / seconds["matmul"],
        )

    def _milliseconds(self, way: Way) -> float:
        """Time of one call with nothing of its operands in the L2 cache."""
        if not self.is_gpu:
            start = time.perf_counter()
            way()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the device is busy with it while the host gets ahead, so that launches cost no time
        self._flushed.zero_()
        begin.record()
        way()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def arguments_of(parser: argparse.ArgumentParser, *, rounds: int) -> argparse.Namespace:
    """Arguments of a benchmark of kernels: its own, and those that say where and how often.

    Args:
        parser: With what the benchmark has of its own.
        rounds: Of each measurement, if not given and not a proof.
    """
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="default: bfloat16, float32 on the CPU")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--rounds", type=int, help=f"default: {rounds}, 1 with --small")
    found = parser.parse_args()
    found.dtype = found.dtype or ("float32" if found.device == "cpu" else "bfloat16")
    found.rounds = found.rounds or (1 if found.small else rounds)
    return found


def _summary(milliseconds: Sequence[float]) -> dict[str, float]:
    fifths = quantiles(milliseconds, n=5) if len(milliseconds) > 1 else [milliseconds[0]] * 4
    return {"median_ms": median(milliseconds), "p20_ms": fifths[0], "p80_ms": fifths[-1]}


def difference(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Norm of what differs over the norm of what is expected, the largest of several tensors."""
    pairs = zip(outputs, expected, strict=True)
    return max(
        float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs
    )
