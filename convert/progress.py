"""How far work on the layers of a model is, in parts of a layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from convert.methods.least_squares import Tick

__all__ = ["PARTS", "LayerProgress"]

PARTS = 100  # of a layer, in which progress is reported


class LayerProgress:
    """Adds up ticks of work on layers, and reports them in whole parts.

    Ticks may come from any thread; reports are made in the one that made this object.

    Args:
        progress: Called with the number of parts just done; ``PARTS`` of them are a layer.
    """

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._done, self._end = 0.0, 0
        self._reported = 0
        self._lock = threading.Lock()
        self._home = threading.get_ident()

    @contextmanager
    def layers(self, count: int) -> Iterator[None]:
        """Work on so many layers; at its end they are done, whatever ticks were counted."""
        self._end += count
        yield
        self._done = self._end
        self.report()

    def ticks(self, share: float, count: int = 1) -> Tick:
        """A function to call so many times while this share of a layer is done."""

        def tick() -> None:
            with self._lock:
                self._done = min(self._done + share / count, self._end)
            self.report()

        return tick

    def report(self) -> None:
        """Report what other threads have done meanwhile."""
        new = int(self._done * PARTS) - self._reported
        if new > 0 and threading.get_ident() == self._home:
            self._reported += new
            self._progress(new)
