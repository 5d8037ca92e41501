"""What the user sees. Results go to stdout, everything else to stderr; only here is it printed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from convert.signals import at_hard_end

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = ["Console", "visible"]

# the time that is left is told from the pace of the last so many: a step can take minutes
_SPEED_SECONDS = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """Output of one command.

    Args:
        json: Results as JSON instead of text.
        quiet: No messages, only results and errors.
        verbose: More detail.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def result(self, data: Any, text: Callable[[], None]) -> None:
        """Print the result of the command: ``data`` as JSON, or whatever ``text`` prints."""
        if self.json:
            sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        else:
            text()
        sys.stdout.flush()

    def line(self, text: str) -> None:
        """A line of the result."""
        sys.stdout.write(text + "\n")

    def note(self, text: str) -> None:
        """A message about progress."""
        if not self.quiet:
            sys.stderr.write(visible(text) + "\n")

    def warn(self, text: str) -> None:
        """A message that should be read."""
        if not self.quiet:
            sys.stderr.write(f"warning: {visible(text)}\n")

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: int = 1
    ) -> None:
        """A table of the result; the columns from ``numeric`` on are aligned to the right."""
        from rich.console import Console as RichConsole  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, pad_edge=False)
        for index, column in enumerate(columns):
            right = index >= numeric
            table.add_column(
                column, justify="right" if right else "left", no_wrap=right, overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        # rendered to text first: rich would turn a closed pipe into an exit of its own
        drawn = StringIO()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 140
        RichConsole(file=drawn, width=width, highlight=False).print(table)
        if title:
            self.line(visible(title))
        for row in drawn.getvalue().splitlines():
            self.line(row.rstrip())

    @contextmanager
    def stages(self) -> Iterator[Callable[[str, int, int], None]]:
        """Progress bars on stderr, one for each stage of the work, if that is a terminal.

        Yields:
            A function to call with the stage, the amount of it just done, and its amount in all.
        """
        if self._hides_progress:
            yield lambda stage, done, total: None
            return
        from rich import progress as bars  # noqa: PLC0415

        with _bar(*bars.Progress.get_default_columns()) as bar:
            tasks: dict[str, bars.TaskID] = {}

            def advance(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], advance=done)

            yield advance

    @contextmanager
    def bars_of_others(self) -> Iterator[None]:
        """Keep what libraries write to stderr out of logs, where our bars are hidden too."""
        with redirect_stderr(StringIO()) if self._hides_progress else nullcontext():
            yield

    @property
    def _hides_progress(self) -> bool:
        unwanted = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "") in {"1", "true"}
        return self.quiet or unwanted or not sys.stderr.isatty()

    @contextmanager
    def progress(self, title: str, *, unit: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar on stderr, if that is a terminal.

        Yields:
            A function to call with the amount done so far and the amount in all.
        """
        if self._hides_progress:
            yield lambda done, total: None
            return
        from rich import progress as bars  # noqa: PLC0415

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn(unit),
            bars.TimeRemainingColumn(),
        )
        with _bar(*columns) as bar:
            task = bar.add_task(title, total=None)

            def advance(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            yield advance


@contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Progress]:
    from rich.console import Console as RichConsole  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    bar = Progress(
        *columns,
        console=RichConsole(stderr=True),
        transient=True,
        speed_estimate_period=_SPEED_SECONDS,
    )
    with bar, at_hard_end(lambda _: bar.stop()):  # which hides the cursor meanwhile
        yield bar


def visible(text: str) -> str:
    """Text with control characters spelled out, for names that come from a file."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
    return shown if len(shown) <= 4000 else shown[:4000] + " ..."
