"""SIGINT and SIGTERM: an exception that unwinds the stack, and an end where that takes too long.

Python runs the handler of a signal in the main thread, between two of its instructions. A
factorisation of a large layer keeps that thread for seconds, and so do threads that an unwinding
stack waits for. A process of the command line therefore has a thread that hears of signals at once,
through a pipe that the handler of the operating system writes to, and that ends the process where
unwinding takes too long. Nothing is lost: what is on the disk outlives SIGKILL at any moment.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from kvpatch.errors import Terminated

__all__ = ["at_hard_end", "ending_soon", "sigterm_unwinds"]

_GRACE = 0.8  # seconds for unwinding; to free the memory of a large layer can take another
_REPEATS = 0.2  # seconds in which a signal may come twice, as it does from the command timeout
_FAREWELL = 0.3  # seconds for what is done at the end: nobody may be reading what is written

_USUAL: dict[int, Callable[..., object] | int] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
_farewells: list[Callable[[int], object]] = []
_heard: list[int] = []


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that locks are released and the journal stays whole."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) == _unwind_once:
        yield
        return
    previous = signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def at_hard_end(function: Callable[[int], object]) -> Iterator[None]:
    """Have a function called if a signal ends the process before its stack is unwound.

    Args:
        function: Called in a thread with the number of the signal, those of outer contexts first.
    """
    _farewells.append(function)
    try:
        yield
    finally:
        _farewells.remove(function)


@contextmanager
def ending_soon() -> Iterator[None]:
    """For the whole life of a process: SIGINT and SIGTERM unwind it, and end it within two seconds.

    After the first signal, a second one ends it at once. It ends with 128 and the signal's number.
    """
    if sys.platform == "win32":  # where commands refuse to run
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number, usual in _USUAL.items():
        if signal.getsignal(number) == usual:  # what the parent had ignored stays so
            signal.signal(number, _unwind_once)
    # a child's signals are none of ours: until it has let go of the pipe, they wait
    hold, let_go = (
        functools.partial(signal.pthread_sigmask, how, _USUAL)
        for how in (signal.SIG_BLOCK, signal.SIG_UNBLOCK)
    )
    os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=_back_to_usual)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    except SystemExit:
        if _heard:  # measured: the interpreter takes seconds to end, and that thread ends first
            os._exit(128 + _heard[0])
        raise


def _unwind(number: int, _: FrameType | None) -> NoReturn:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _unwind_once(number: int, frame: FrameType | None) -> None:
    """Unwind at the first signal; those that follow must not hit what cleans up after it."""
    if not _heard:
        _heard.append(number)
        _unwind(number, frame)


def _back_to_usual() -> None:
    """In a forked child: what it is sent must not end its parent."""
    signal.set_wakeup_fd(-1)
    for number, usual in _USUAL.items():
        if signal.getsignal(number) == _unwind_once:
            signal.signal(number, usual)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _USUAL)


def _watch(reader: int) -> None:
    number = 0
    while number not in _USUAL:  # others may have handlers too
        number = os.read(reader, 1)[0]
    time.sleep(_REPEATS)
    if select.select([reader], [], [], 0)[0]:
        os.read(reader, 4096)
    select.select([reader], [], [], _GRACE - _REPEATS)
    farewell = threading.Thread(target=_say_farewell, args=(number,), daemon=True)
    farewell.start()
    farewell.join(_FAREWELL)
    os._exit(128 + number)


def _say_farewell(number: int) -> None:
    for function in _farewells:
        function(number)
