"""SIGINT and SIGTERM end every command soon, also in the middle of what hears of no signal."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from convert import signals
from convert.progress import LayerProgress
from convert.streams import side_by_side
from kvpatch.errors import InputModelError
from tests.families.texts import random_text, write_tokenizer
from tests.faults.running import Child, Run, cli, contents, gqa, names
from tests.faults.small_llama import write_llama

_ENDS_WITHIN = 10  # seconds, on a busy machine; two are promised


@dataclass(frozen=True)
class Stuck:
    """A function of the run goes on in native code for a minute or more, where no handler runs."""

    place: str
    began: Path

    def __call__(self) -> None:
        def stuck(*_: object, **__: object) -> None:
            self.began.touch()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 28)

        module, _, name = self.place.rpartition(".")
        setattr(import_module(module), name, stuck)


@dataclass(frozen=True)
class SignalDuringFit:
    """The process sends itself a signal a moment after the given fit of heads has begun."""

    signal: signal.Signals
    fit: int
    sent: Path

    def __call__(self) -> None:
        from convert.methods import refit_scores

        solve, fits = refit_scores.solve, iter(range(1, 1000))

        def send() -> None:
            self.sent.touch()
            os.kill(os.getpid(), self.signal)

        def counted(*args: object, **options: object) -> object:
            if next(fits) == self.fit:
                threading.Timer(0.2, send).start()
            return solve(*args, **options)  # type: ignore[arg-type]

        refit_scores.solve = counted  # type: ignore[assignment]


def _appears(file: Path, child: Child) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert child.process.is_alive(), child.wait()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _signalled(child: Child, began: Path, numbers: list[signal.Signals]) -> tuple[Run, float]:
    """How a run ended that was sent signals, and how many seconds after the last of them."""
    try:
        _appears(began, child)
        for number in numbers:
            assert child.process.pid is not None
            os.kill(child.process.pid, number)
            time.sleep(0.5 * (number is not numbers[-1]))
        sent = time.monotonic()
        child.process.join(_ENDS_WITHIN)
        took = time.monotonic() - sent
        assert not child.process.is_alive(), "it goes on"
        return child.wait(), took
    finally:
        child.process.kill()


_CALIBRATED = ["--merge", "svd", "--calibration", "{text}", "--samples", "2", "--context", "16"]
# a function, and a command that calls it
_PLACES = {
    "convert.preparing.make_plan": ["gqa", "{source}", "{out}", "--kv-heads", "2"],
    "convert.preparing.choose_plan": ["cla", "{source}", "{out}", "--share", "2", "--layers=auto"],
    "convert.survey.joint": ["mla", "{source}", "{out}", "--kv-budget", "50%"],
    "convert.texts.load_tokenizer": ["mqa", "{source}", "{out}", *_CALIBRATED],
    "convert.calibrate.second_moments": ["mqa", "{source}", "{out}", *_CALIBRATED],
    # in a thread that the main thread waits for
    "convert.methods.fitting.refit_scores": ["mqa", "{source}", "{out}", *_CALIBRATED],
    "convert.execute.emit": ["mqa", "{source}", "{out}"],
    "convert.checkpoint.writer._write_all": ["mqa", "{source}", "{out}"],
    "convert.checkpoint.reader.hub_blob_sha256": ["mqa", "{source}", "{out}"],  # a thread too
    "convert.inspection.inspect_source": ["inspect", "{source}"],
    "convert.verify.verify_checkpoint": ["verify", "{source}"],
    "convert.loading.load_pair": ["eval", "{source}", "--retrieval"],
    "convert.bench.bench_checkpoints": ["bench", "{source}"],
    "convert.report.write_report": ["report", "{source}", "--to", "{out}"],
    "convert.hub.push.push_folder": ["push", "{source}", "org/name"],
    "convert.training.run.uptrain": [
        *("uptrain", "{source}", "{out}", "--data", "{text}", "--tokens", "100")
    ],
}
_CONTINUES = {"gqa", "mqa", "cla", "mla", "push", "uptrain"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    write_llama(folder / "model", vocab=97)
    write_tokenizer(folder / "model")
    (folder / "text.txt").write_text(random_text(100, seed=0))
    return folder / "model"


@pytest.mark.parametrize("place", _PLACES)
def test_every_command_ends_out_of_native_code(source: Path, tmp_path: Path, place: str) -> None:
    given = {"source": source, "out": tmp_path / "out", "text": source.parent / "text.txt"}
    arguments = [word.format(**given) for word in _PLACES[place]]
    before = contents(source.parent)
    number = signal.SIGTERM if len(place) % 2 else signal.SIGINT
    child = Child(arguments, Stuck(place, tmp_path / "began"))
    run, _ = _signalled(child, tmp_path / "began", [number])
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert run.code == 128 + number, run.err
    assert run.out == ""
    said = [line for line in run.err.splitlines() if not line.startswith("warning: ")]
    assert said[0] == f"error: {word}"
    continues = len(said) == 2 and said[1].endswith("run the same command again to continue.")
    assert continues == (arguments[0] in _CONTINUES), said
    left = [name for name in names(tmp_path) if not name.startswith(".out.partial-")]
    assert left == ["began"]  # neither an output nor its lock
    assert contents(source.parent) == before


def _no_end_of_grace() -> None:
    signals._GRACE = 3600.0


def test_a_second_signal_does_not_wait(source: Path, tmp_path: Path) -> None:
    stuck = Stuck("convert.execute.emit", tmp_path / "began")
    child = Child(gqa(source, tmp_path / "out"), stuck, _no_end_of_grace)
    run, _ = _signalled(child, tmp_path / "began", [signal.SIGINT, signal.SIGTERM])
    assert run.code == 130  # the first says why


def test_what_has_not_begun_is_dropped_after_an_error() -> None:
    called: list[int] = []

    def fit(number: int) -> None:
        called.append(number)
        if number == 0:
            raise InputModelError("no")
        time.sleep(0.05)

    with pytest.raises(InputModelError):
        side_by_side(fit, range(1000), work=LayerProgress(lambda _: None))
    assert len(called) < 100


def test_signals_that_were_ignored_stay_so(source: Path, tmp_path: Path) -> None:
    """As for a command in the background of a shell script, which Ctrl-C is not meant for."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from convert import pipeline\n"
        "convert = pipeline.convert\n"
        "def signalled(*args, **options):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return convert(*args, **options)\n"
        "pipeline.convert = signalled\n"
        "from convert.cli import main\n"
        f"sys.argv[1:] = {gqa(source, tmp_path / 'out')}\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_program_that_converts_is_never_ended(source: Path, tmp_path: Path) -> None:
    """Only the command line ends its process; others get an exception, and may go on."""
    script = (
        "import os, signal, time\n"
        "from convert import convert, execute, make_recipe\n"
        "from kvpatch.errors import Terminated\n"
        "execute.emit = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"keys = {{'source': {str(source)!r}, 'output': {str(tmp_path / 'out')!r}}}\n"
        "try: convert(make_recipe({'method': 'mqa', **keys}))\n"
        "except Terminated: time.sleep(2.5); print('goes on')\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (run.returncode, run.stdout) == (0, b"goes on\n"), run.stderr
    assert names(tmp_path) == []


@dataclass(frozen=True)
class EndsFork:
    """Before the run, it ends a process that was forked off, as pools do with their workers."""

    def __call__(self) -> None:
        from convert import pipeline

        convert = pipeline.convert

        def with_fork(*args: object, **options: object) -> Path:
            fork = os.fork()
            if not fork:
                time.sleep(30)
                os._exit(0)
            os.kill(fork, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == -signal.SIGTERM
            time.sleep(1.5)  # within which the run would be ended
            return convert(*args, **options)  # type: ignore[arg-type]

        pipeline.convert = with_fork  # type: ignore[assignment]


def test_a_signal_to_a_forked_process_is_not_ours(source: Path, tmp_path: Path) -> None:
    run = Child(gqa(source, tmp_path / "out"), EndsFork()).wait()
    assert run.code == 0, run.err


@pytest.fixture
def wide(tmp_path: Path) -> list[str]:
    """A conversion whose fits take seconds each, of a layer with wide heads."""
    write_llama(tmp_path / "model", layers=2, hidden=1024, inner=256, vocab=97)
    write_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(12 * 128, seed=0))
    how = ["--samples", "12", "--context", "128", "--calibration", str(tmp_path / "text.txt")]
    return ["mqa", str(tmp_path / "model"), str(tmp_path / "out"), "--merge", "svd", *how]


@pytest.mark.slow
def test_fits_of_a_wide_layer_end_soon_and_are_resumed(wide: list[str], tmp_path: Path) -> None:
    assert cli([*wide[:2], str(tmp_path / "undisturbed"), *wide[3:]]).code == 0
    partial = []
    for number, fit in ((signal.SIGTERM, 2), (signal.SIGINT, 5)):
        sent = tmp_path / number.name
        run, took = _signalled(Child(wide, SignalDuringFit(number, fit, sent)), sent, [])
        assert took < _ENDS_WITHIN
        assert run.code == 128 + number
        assert "run the same command again to continue" in run.err
        partial.append(len(list(tmp_path.glob(".out.partial-*/.scratch/*.safetensors"))))
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.kvpatch-lock").exists()
    assert partial == [0, 1]
    assert cli(wide).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
