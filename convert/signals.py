"""SIGTERM as an exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kvpatch.errors import Terminated

__all__ = ["sigterm_unwinds"]


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that locks are released and the journal stays whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
