"""How fast checkpoints run on this machine, and what their caches take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kvpatch
from convert.adapters import AdapterChoice
from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import read_json
from convert.hub import fetch_source
from convert.lengths import check_length, config_of
from convert.loading import check_device, load_model, quiet_transformers
from convert.verify import cache_bytes, planned_cache
from kvpatch.errors import InputModelError, UsageError

__all__ = ["PATCHED", "STOCK", "Bench", "Run", "bench_checkpoints"]

STOCK, PATCHED = "stock", "patched"
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One model with one attention.

    Args:
        model: Its folder or name.
        attention: ``stock``, or ``patched`` by ``kvpatch.patch``.
        prefill_tokens_per_second: Of the prompt, all sequences together.
        decode_tokens_per_second: Of the new tokens, all sequences together.
        cache_bytes: Held by the cache after the last token.
        planned_cache_bytes: What ``kvpatch.memory`` says of it; None if the model is of a class
            that kvpatch does not know.
        peak_bytes: Most memory in use at a time: allocated on a CUDA device, resident in the
            process elsewhere, weights included; None where the system does not tell.
        detail: What the attention modules ran, if patched.
    """

    model: str
    attention: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    cache_bytes: int
    planned_cache_bytes: int | None
    peak_bytes: int | None
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Measurements and what is needed to repeat them.

    Args:
        device: Where the models ran, with its name.
        dtype: What they ran in.
        batch: Sequences B.
        prompt: Tokens of a prompt.
        new: Tokens decoded after it, one at a time.
        rounds: Of each; rates are medians over them.
        runs: The source first, if there is one, and stock before patched.
    """

    device: str
    dtype: str
    batch: int
    prompt: int
    new: int
    rounds: int
    runs: list[Run]


@dataclass(frozen=True, slots=True)
class _Load:
    """What every model is given to do."""

    batch: int
    prompt: int
    new: int
    device: str

    @property
    def tokens(self) -> int:
        return self.prompt + self.new


@dataclass(slots=True)
class _Sample:
    """Of one round."""

    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    peak_bytes: int | None


def bench_checkpoints(
    models: Sequence[tuple[str, Path]],
    *,
    prompt: int,
    new: int,
    batch: int = 1,
    rounds: int = 3,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: AdapterChoice | None = None,
    patched: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Bench:
    """Time prefill and decoding of models, one model in memory at a time.

    Prompts are random tokens, the same for all; decoding is greedy. Stock and patched attention
    take turns, after one round that is not counted.

    Args:
        models: Names and folders.
        prompt: Tokens of a prompt.
        new: Tokens to decode, one at a time.
        batch: Sequences at a time.
        rounds: Of each measurement.
        device: Where the models run.
        dtype: What they run in; float32 on the CPU and the checkpoint's own elsewhere.
        adapter: What to do with an adapter beside the weights of one.
        patched: Measure only patched attention, or only stock; both, where a model can be patched,
            if None.
        progress: Called with rounds done and in all.
        note: Called with what should be read.

    Raises:
        UsageError: There is no such device, a model has no positions for so many tokens, or cannot
            be patched where that is asked for.
        VerificationError: A model does not load.
    """
    check_device(device)
    if dtype is None and device == "cpu":
        dtype = torch.float32
    load = _Load(batch, prompt, new, device)
    done = iter(range(1, 1 + len(models) * (rounds + 1)))
    runs: list[Run] = []
    with quiet_transformers():
        for name, folder in models:
            model = load_model(folder, dtype=dtype, device=device, adapter=adapter)
            asked = f"--prompt {prompt} --new {new} ({load.tokens:,} tokens)"
            for warning in check_length(config_of(model), load.tokens, name=name, asked=asked):
                if note is not None:
                    note(warning)
            attentions = _attentions(name, model, patched, note)
            samples: dict[str, list[_Sample]] = {attention: [] for attention in attentions}
            for _ in range(rounds + 1):
                for attention in attentions:
                    samples[attention].append(_sample(model, attention, load))
                if progress is not None:
                    progress(next(done), len(models) * (rounds + 1))
            plan = _planned(folder, model, load)
            runs += [
                _run(load, samples[at][1:], name, at, planned=plan, detail=attentions[at])
                for at in samples
            ]
            kind = str(model.dtype).removeprefix("torch.")
            del model
    return Bench(
        device=_name(device),
        dtype=kind,
        batch=batch,
        prompt=prompt,
        new=new,
        rounds=rounds,
        runs=runs,
    )


def _attentions(
    name: str, model: Any, patched: bool | None, note: Callable[[str], None] | None
) -> dict[str, str | None]:
    """What to measure of a model, each with what its attention modules run then."""
    if patched is False:
        return {STOCK: None}
    try:
        with kvpatch.patched(model) as report:
            runs: dict[str, str | None] = {} if patched else {STOCK: None}
            return {**runs, PATCHED: str(report)}
    except UsageError as error:
        if patched:
            raise
        if note is not None:
            why = error.message.partition(";")[0]
            note(f"{name} is measured in stock form alone: {why}")
        return {STOCK: None}


@torch.inference_mode()
def _sample(model: Any, attention: str, load: _Load) -> _Sample:
    """Run prompt and new tokens once."""
    from transformers import DynamicCache  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    shape = (load.batch, load.prompt)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(load.device)
    put: AbstractContextManager[Any] = (
        kvpatch.patched(model) if attention == PATCHED else nullcontext()
    )
    cache: Any = DynamicCache(config=model.config)
    with put, _peak(load.device) as peak:
        start = _now(load.device)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        prefilled = _now(load.device)
        for _ in range(load.new):
            token = logits[:, -1:].argmax(-1)
            logits = model(token, past_key_values=cache, use_cache=True).logits
        decoded = _now(load.device)
    return _Sample(prefilled - start, decoded - prefilled, cache_bytes(cache), peak[0])


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _peak(device: str) -> Iterator[list[int | None]]:
    """A list whose one element is the most memory that was in use in the ``with`` block."""
    found: list[int | None] = [None]
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device)
        return
    told = _reset_peak()
    yield found
    found[0] = _resident_peak() if told else None


def _reset_peak() -> bool:
    """Have Linux forget the peak of this process; whether it does."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _run(
    load: _Load,
    samples: Sequence[_Sample],
    name: str,
    attention: str,
    *,
    planned: int | None,
    detail: str | None,
) -> Run:
    """The measurement that rounds add up to."""
    prefill = median(sample.prefill_seconds for sample in samples)
    decode = median(sample.decode_seconds for sample in samples)
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    return Run(
        model=name,
        attention=attention,
        prefill_tokens_per_second=load.batch * load.prompt / prefill,
        decode_tokens_per_second=load.batch * load.new / decode,
        cache_bytes=samples[-1].cache_bytes,
        planned_cache_bytes=planned,
        peak_bytes=max(peaks, default=None),
        detail=detail,
    )


def _planned(folder: Path, model: Any, load: _Load) -> int | None:
    """Bytes that the cache should take in the dtype in which the model runs."""
    try:
        described = fetch_source(str(folder)).folders[0]
        cache = planned_cache(read_json(guarded_path(described, "config.json")))
    except InputModelError:
        return None
    values = cache.size(load.tokens, load.batch) // cache.bytes_per_value
    width: int = model.dtype.itemsize
    return width * values


def _name(device: str) -> str:
    if torch.device(device).type != "cuda":
        threads = torch.get_num_threads()
        return f"{device}, {threads} thread{'s' * (threads > 1)}"
    return f"{device}, {torch.cuda.get_device_name(device)}"
