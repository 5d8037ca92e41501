"""What must hold for every case, whatever is wrong with it."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvpatch.errors import OutputError
from tests.faults.running import Run, cli, contents
from tests.fuzz.draft import Draft

__all__ = ["Oracle"]

_CODES = {0, 2, 3, 4, 5, 6, 7}
# what a run may find in numbers alone, that no header tells
_NUMBERS = ((3, r"NaN or infini|too much alike to be decomposed"), (6, r"overflows in "))
# beyond what a command holds already: tiny models and a few buffers of eight megabytes each
_MOST_RESIDENT = 100_000_000
_MOST_MAPPED = 3_000_000_000


@dataclass(slots=True)
class Oracle:
    """Runs all commands on one case and notes what must not be.

    Args:
        draft: The case.
        folder: Where it lies, and the current folder.
        noise: What was written to stdout past the command line since it was last asked.
    """

    draft: Draft
    folder: Path
    noise: Callable[[], str]
    found: list[str] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)

    def check(self) -> list[str]:
        """All that is wrong with what kvpatch makes of the case."""
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(self.draft.recipe, allow_unicode=True))
        before = contents(self.folder)
        looked = self._run("inspect", "source")
        self._unchanged(before, "inspect")
        planned = self._run("run", "recipe.yaml", "--dry-run")
        self._unchanged(before, "the dry run")
        ran = self._run("run", "recipe.yaml")
        self._agree(looked, planned, ran)
        if ran.code:
            self._unchanged(before, "the run", after_failure=True)
        else:
            self._result(before, Path(json.loads(ran.out)["output"]))
        return self.found

    def _note(self, text: str) -> None:
        self.found.append(text)

    def _run(self, *arguments: str) -> Run:
        """Run a command and hold its exit code, messages and memory to what is always true."""
        command = " ".join(arguments)
        with _bounded_memory() as peak:
            run = cli([*arguments, "--json"])
        if peak() > _MOST_RESIDENT:
            self._note(f"{command} took {peak() / 1e6:.0f} MB beyond what it began with")
        if noise := self.noise():
            self._note(f"{command} printed past the command line: {noise[:300]!r}")
        if run.code not in _CODES:
            debug = cli([*arguments, "--debug"])
            self._note(f"{command} ended with {run.code}: {_where(debug.err)}")
        self._messages(command, run)
        return run

    def _messages(self, command: str, run: Run) -> None:
        errors = re.findall(r"^error: *(.*)", run.err, re.MULTILINE)
        if not run.code:
            if errors:
                self._note(f"{command} succeeded with an error: {run.err!r}")
            try:
                json.loads(run.out)
            except ValueError:
                self._note(f"{command} printed what is no JSON: {run.out[:300]!r}")
            return
        if len(errors) != 1 or not re.search(r"\w", errors[0]):
            self._note(f"{command} ended with {run.code} and not one error: {run.err[-600:]!r}")
        if re.search(r"^hint: *$", run.err, re.MULTILINE):
            self._note(f"{command} gave an empty hint: {run.err!r}")
        if run.out and not command.startswith("verify"):
            self._note(f"{command} failed and printed {run.out[:300]!r}")

    def _unchanged(self, before: dict[str, Any], what: str, *, after_failure: bool = False) -> None:
        """Nothing may be written; after a failure, but for shards to continue from."""
        after = contents(self.folder)
        if after_failure:
            kept = _resumable(after)
            after = {name: c for name, c in after.items() if not f"{name}/".startswith(kept)}
        if after != before:
            changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
            self._note(f"{what} left or changed {sorted(changed)[:6]}")

    def _agree(self, looked: Run, planned: Run, ran: Run) -> None:
        """What the plan says is what happens."""
        if "no output folder is given" in ran.err:
            return
        if planned.code:
            before, after = (f"{run.code}: {_errors(run)!r:.400}" for run in (planned, ran))
            if before != after and ran.code != OutputError.exit_code:
                self._note(f"the dry run ended with {before}, the run with {after}")
            return
        if looked.code and self.draft.recipe.get("source") == "source":
            self._note(f"planned, but inspect ended with {looked.code}: {_errors(looked)!r:.400}")
        if not ran.code:
            return
        said = _errors(ran)
        announced = f"the run would stop: {said.splitlines()[0]}" in _without_numbers(planned.err)
        numbers = (self.draft.numbers or self.draft.recipe.get("dtype") == "float16") and any(
            code == ran.code and re.search(pattern, said) for code, pattern in _NUMBERS
        )
        if not (announced or numbers):
            self._note(f"the dry run passed, the run ended with {ran.code}: {said!r:.400}")

    def _result(self, before: dict[str, Any], out: Path) -> None:
        """The result is whole, sound, and all that is new."""
        after = contents(self.folder)
        place = (self.folder / out).relative_to(self.folder).as_posix()
        others = {n for n in before.keys() | after.keys() if not f"{n}/".startswith(f"{place}/")}
        if wrong := sorted(n for n in others if before.get(n) != after.get(n)):
            self._note(f"the run left or changed {wrong[:6]} beside its output")
        checked = self._run("verify", str(out), "source")
        if not checked.code:
            return
        checks = json.loads(checked.out)["checks"] if checked.out else []
        failed = {c["name"]: c["detail"] for c in checks if c["status"] == "failed"}
        if failed.keys() == {"cached decoding"} and not self._source_decodes():
            return
        found = "; ".join(f"{name}: {detail}" for name, detail in failed.items())
        self._note(f"verify ended with {checked.code}: {found or _errors(checked):.600}")

    def _source_decodes(self) -> bool:
        """Whether the source passes the check itself.

        What it cannot do, for numbers that are too large, no result can.
        """
        checked = self._run("verify", "source")
        checks = json.loads(checked.out)["checks"] if checked.out else []
        return {"cached decoding": "ok"}.items() <= {c["name"]: c["status"] for c in checks}.items()


def _resumable(files: Mapping[str, Any]) -> tuple[str, ...]:
    """Staging folders with a finished shard or finished layers, from which a run continues."""
    kept = set()
    for name, content in files.items():
        folder, _, file = name.rpartition("/")
        if file == ".journal.jsonl" and len(content.splitlines()) > 1:
            kept.add(f"{folder}/")
        elif folder.endswith("/.scratch") and file.endswith(".safetensors"):
            kept.add(folder.removesuffix(".scratch"))
    return tuple(kept)


def _errors(run: Run) -> str:
    """The error of a run with its hint; free memory differs from moment to moment."""
    message = re.search(r"^error: (.*)", run.err, re.MULTILINE | re.DOTALL)
    return _without_numbers(message[1].strip() if message else "")


def _without_numbers(text: str) -> str:
    return re.sub(r"[\d.,]+ [kMGT]?B are free", "... are free", text)


def _where(err: str) -> str:
    """Exception and the last place in our own code, of a run with --debug."""
    places = re.findall(r'File ".*?/((?:convert|kvpatch)/[\w/]+\.py)", line (\d+)', err)
    file, line = places[-1] if places else ("?", "?")
    return f"{_bug(err)} ({file}:{line})"


def _bug(err: str) -> str:
    message = re.search(r"^error: (.*)", err, re.MULTILINE)
    return message[1][:300] if message else err[-300:]


@contextmanager
def _bounded_memory() -> Iterator[Callable[[], int]]:
    """Watch resident memory; a far larger request of address space fails at once.

    Yields:
        A function that tells by how many bytes resident memory had grown at its peak.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def size(key: str) -> int:
        found = re.search(rf"{key}:\s*(\d+) kB", status.read_text())
        assert found is not None
        return 1024 * int(found[1])

    clear.write_text("5")  # the peak starts from now
    start = size("VmRSS")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size("VmSize") + _MOST_MAPPED, hard))
    try:
        yield lambda: size("VmHWM") - start
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
