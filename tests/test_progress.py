"""Progress moves within layers, comes to its whole, and counts what is done."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest

from convert import convert, make_recipe
from convert.console import Console
from convert.progress import PARTS, LayerProgress
from tests.families.stock import make
from tests.families.texts import random_text, write_tokenizer
from tests.families.tiny import settings

LAYERS = 4
_WAYS = {
    "gqa": {"method": "gqa", "kv_heads": 2, "merge": "svd"},
    "cla": {"method": "cla", "share": 2, "merge": "svd"},
    "cla-auto": {"method": "cla", "share": 2, "merge": "svd", "layers": "auto"},
    "mla": {"method": "mla", "kv_budget": "50%"},
    "mla-share": {"method": "mla", "kv_budget": "50%", "share": 2},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    made = make("llama", {**settings("llama"), "num_hidden_layers": LAYERS})
    made.save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    (folder / "text.txt").write_text(random_text(300, seed=0))
    return folder / "model"


@pytest.mark.parametrize("way", _WAYS)
def test_every_stage_moves_within_layers_and_ends_at_its_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    expected: list[int] = []
    called: Counter[int] = Counter()
    ticks = LayerProgress.ticks

    def counted(work: LayerProgress, share: float, count: int = 1) -> Callable[[], None]:
        number, tick = len(expected), ticks(work, share, count)
        expected.append(count)
        return lambda: (called.update([number]), tick())[1]

    monkeypatch.setattr(LayerProgress, "ticks", counted)
    moves: dict[str, list[tuple[int, int]]] = {}
    keys = {"source": str(source), "output": str(tmp_path / "out"), **_WAYS[way]}
    text = {"calibration": str(source.parent / "text.txt"), "samples": 8, "context": 16}
    convert(
        make_recipe({**keys, **text}),
        progress=lambda stage, done, total: moves.setdefault(stage, []).append((done, total)),
    )
    looks = way in {"cla-auto", "mla", "mla-share"}
    assert list(moves) == [*["looking"][:looks], "calibrating", "converting"]
    for stage, made in moves.items():
        (total,) = {total for _, total in made}
        assert all(done > 0 for done, _ in made)
        assert sum(done for done, _ in made) == total
        if stage != "converting":
            assert total == PARTS * LAYERS
            unit = int(keys.get("share", 1))
            assert max(done for done, _ in made) <= unit * PARTS // 2
    assert expected == [called[number] for number in range(len(expected))]


def test_work_of_other_threads_is_reported_at_home() -> None:
    told: list[tuple[int, int]] = []
    work = LayerProgress(lambda parts: told.append((parts, threading.get_ident())))
    with work.layers(2):
        tick = work.ticks(1.5, 6)
        threads = [threading.Thread(target=tick) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told == []
        work.report()
        assert told == [(125, threading.get_ident())]
        tick()
    assert [parts for parts, _ in told] == [125, 25, 50]


def test_more_ticks_than_said_do_not_pass_the_layers() -> None:
    told: list[int] = []
    work = LayerProgress(told.append)
    with work.layers(1):
        tick = work.ticks(1.0, 2)
        for _ in range(5):
            tick()
    assert sum(told) == PARTS


class _Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds", [1, 500], ids=["fast", "slow"])
def test_time_left_is_told_from_steps_of_any_length(
    monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """A tenth of the work in each step: after three of them, seven are left."""
    from rich.progress import Progress

    now = 0.0
    monkeypatch.setattr("rich.console.monotonic", lambda: now)
    monkeypatch.setattr("sys.stderr", _Terminal())
    bars: list[Progress] = []
    add_task = Progress.add_task
    monkeypatch.setattr(
        Progress, "add_task", lambda bar, *a, **k: (bars.append(bar), add_task(bar, *a, **k))[1]
    )
    left = []
    with Console().stages() as advance:
        for _ in range(4):
            advance("calibrating", 10, 100)
            now += seconds
            left.append(bars[0].tasks[0].time_remaining)
    assert left[-1] == pytest.approx(6 * seconds, abs=1)
    assert all(later <= earlier for earlier, later in pairwise(x for x in left if x))
