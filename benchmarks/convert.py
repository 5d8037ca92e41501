"""What a conversion costs beside a plain copy and beside the usual load-and-save script.

    python -m benchmarks.convert --dir /scratch/bench --sizes 2 4 --repeats 3

On a random bfloat16 Llama checkpoint (7B layers, as many as the size takes), to 8 KV heads:

    copy      cp of the folder
    kvpatch   python -m convert gqa, which also hashes what it reads and what it writes
    usual     from_pretrained, average the heads, save_pretrained

Each way is a process of its own, started from the same state of the page cache, and counts until
its output is flushed to the disk. The ways take turns; the numbers shown are medians. At the end
the weights of ``kvpatch`` and ``usual`` are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.environment import environment, filesystem, write_result

KV_HEADS = 8
COPY, KVPATCH, USUAL = "copy", "kvpatch", "usual"
_PROBES = 20  # few: each that misses makes the kernel read ahead a little
_WARM_SHARE = 0.05

Sample = dict[str, float | str]


def main() -> None:
    """Measure, write ``results/convert.json`` and print a table."""
    arguments = _arguments()
    facts = environment()
    work = arguments.dir / "convert-benchmark"
    work.mkdir(parents=True)  # not exist_ok: it is deleted afterwards
    try:
        runs = [measure_size(work, size, arguments) for size in arguments.sizes]
        facts["machine"]["filesystem"] = filesystem(work)
    finally:
        shutil.rmtree(work)
    result = {
        **facts,
        "conditions": {
            "checkpoint": "random bfloat16 Llama, 7B layers, shards of 1 GB",
            "kv_heads": [32, KV_HEADS],
            "wall": "seconds from start of the process until the output is fsynced",
            "peak_rss": "ru_maxrss of the process in bytes; counts pages of mapped files too",
            "repeats": arguments.repeats,
            "order": "the ways take turns",
            "note": arguments.note,
        },
        "runs": runs,
    }
    path = write_result("convert", result)
    print_table(runs)
    print(f"written to {path}")


def measure_size(work: Path, gigabytes: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """All repeats of all ways on one checkpoint."""
    source = work / "source"
    _module("benchmarks.llama_checkpoint", source, gigabytes)
    ways = (COPY, KVPATCH) if arguments.skip_usual else (COPY, KVPATCH, USUAL)
    samples: dict[str, list[Sample]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        for way in ways:
            out = work / way
            shutil.rmtree(out, ignore_errors=True)
            samples[way].append(measure(way, source, out))
            print(f"{gigabytes:g} GB, repeat {repeat}: {way} {samples[way][-1]}", file=sys.stderr)
    run = {
        "source_bytes": sum(path.stat().st_size for path in source.iterdir()),
        "layers": json.loads((source / "config.json").read_text())["num_hidden_layers"],
        "samples": samples,
        **_summary(samples),
    }
    if not arguments.skip_usual:
        same = _module("benchmarks.same_weights", work / KVPATCH, work / USUAL)
        run["kvpatch_against_usual"] = json.loads(same)
    for folder in (source, *(work / way for way in ways)):
        shutil.rmtree(folder)
    return run


def measure(way: str, source: Path, out: Path) -> Sample:
    """One run of one way."""
    command: Mapping[str, Sequence[str]] = {
        COPY: ("cp", "-r", str(source), str(out)),
        KVPATCH: _python(
            "convert", "gqa", str(source), str(out), "--kv-heads", str(KV_HEADS), "--quiet"
        ),
        USUAL: _python("benchmarks.usual_way", str(source), str(out), str(KV_HEADS)),
    }
    cache = settle_cache(source)
    start = time.perf_counter()
    process = subprocess.Popen(command[way], stdout=subprocess.DEVNULL, env=_environ())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, not by Popen
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[way])} exited with {process.returncode}")
    _flush(out)
    return {
        "wall": time.perf_counter() - start,
        "peak_rss": usage.ru_maxrss * 1024,
        "cpu": usage.ru_utime + usage.ru_stime,
        "cache": cache,
    }


def settle_cache(source: Path) -> str:
    """Give every run the same start: no dirty pages, and the source out of the page cache.

    Returns:
        ``cold``; or ``warm`` where the system keeps the pages and all files were read instead.
    """
    os.sync()
    files = sorted(path for path in source.iterdir() if path.suffix == ".safetensors")
    for path in files:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if max(map(_cached_share, files)) <= _WARM_SHARE:
        return "cold"
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    return "warm"


def _cached_share(path: Path) -> float:
    """Share of a file that lies in the page cache, from reads that fail where they would wait."""
    size, hits = path.stat().st_size, 0
    with path.open("rb", buffering=0) as stream:
        for probe in range(_PROBES):
            with suppress(BlockingIOError):
                offset = size * probe // _PROBES
                hits += os.preadv(stream.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
    return hits / _PROBES


def _flush(folder: Path) -> None:
    """Fsync a folder and its files; sync(2) would also wait for what other programs wrote."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _module(name: str, *arguments: object) -> str:
    """Run one of our modules in a process of its own and return what it prints.

    This process stays small that way: what it has resident at a fork counts towards the peak
    of the child.
    """
    command = _python(name, *map(str, arguments))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=_environ())
    return done.stdout


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _environ() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _summary(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    medians = {
        way: {key: median(float(s[key]) for s in runs) for key in ("wall", "peak_rss", "cpu")}
        for way, runs in samples.items()
    }
    wall = {way: values["wall"] for way, values in medians.items()}
    ratios = {"kvpatch_to_copy": wall[KVPATCH] / wall[COPY]}
    if USUAL in wall:
        ratios["usual_to_kvpatch"] = wall[USUAL] / wall[KVPATCH]
    return {"medians": medians, "wall_ratios": ratios}


def print_table(runs: Sequence[Mapping[str, Any]]) -> None:
    """Medians of every size and way."""
    print(f"{'source':>9}  {'way':8} {'wall':>8} {'CPU':>8} {'peak RSS':>10}  {'to copy':>8}")
    for run in runs:
        copy = run["medians"][COPY]["wall"]
        for way, values in run["medians"].items():
            print(
                f"{run['source_bytes'] / 1e9:6.2f} GB  {way:8} {values['wall']:6.1f} s "
                f"{values['cpu']:6.1f} s {values['peak_rss'] / 1e6:7.0f} MB  "
                f"{values['wall'] / copy:7.2f}x"
            )
        if same := run.get("kvpatch_against_usual"):
            wrong = same["differing"]
            print(f"{'':11}{same['compared']} tensors compared, {len(wrong)} differ {wrong[:3]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="work folder, on a real disk")
    parser.add_argument("--sizes", type=float, nargs="+", default=[2, 4], metavar="GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-usual", action="store_true", help="measure copy and kvpatch only")
    parser.add_argument("--note", help="conditions to record, such as what else is running")
    return parser.parse_args()


if __name__ == "__main__":
    main()
