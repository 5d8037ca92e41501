"""The command line's app, and the boundary at which errors become messages and exit codes."""

from __future__ import annotations

import functools
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from convert.console import Console
from convert.signals import at_hard_end
from kvpatch.errors import KvpatchError, Terminated, UsageError

__all__ = ["app", "command"]

_KEPT = "Finished shards are kept; run the same command again to continue."
_AFTER_INTERRUPT = {
    **dict.fromkeys(("gqa", "mqa", "cla", "mla", "export", "run"), _KEPT),
    "uptrain": "The last checkpoint is kept; run the same command again to continue.",
    "push": "What was uploaded is kept and not published; run the same command again to continue.",
}

app = typer.Typer(
    name="kvpatch",
    help="Convert pretrained attention checkpoints to a smaller KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command behind the error boundary: one message and the right exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **options: Any) -> None:
        debug = bool(options.get("debug"))

        def interrupted(number: int) -> int:
            what = "terminated" if number == signal.SIGTERM else "interrupted"
            hint = _AFTER_INTERRUPT.get(function.__name__)
            return _report(what, hint, 128 + number, debug)

        try:
            with at_hard_end(interrupted):
                function(*args, **options)
        except KvpatchError as error:
            raise typer.Exit(_report(error.message, error.hint, error.exit_code, debug)) from None
        except KeyboardInterrupt as interrupt:
            terminated = isinstance(interrupt, Terminated)
            number = signal.SIGTERM if terminated else signal.SIGINT
            raise typer.Exit(interrupted(number)) from None
        except BrokenPipeError:  # the reader of stdout went away, as `| head` does
            raise typer.Exit(0) from None
        except OSError as error:
            message = f"{error.filename or 'a file'}: {error.strerror or error}"
            raise typer.Exit(_report(message, None, UsageError.exit_code, debug)) from None
        except Exception as error:
            message = f"this is a bug in kvpatch: {type(error).__name__}: {error}"
            raise typer.Exit(
                _report(message, "Run with --debug and report it.", 1, debug)
            ) from None

    app.command()(guarded)
    return guarded


def _report(message: str, hint: str | None, code: int, debug: bool) -> int:
    if debug and sys.exception() is not None:
        traceback.print_exc(file=sys.stderr)
    console = Console()
    console.note(f"error: {message}")
    if hint:
        console.note(f"hint: {hint}")
    return code
