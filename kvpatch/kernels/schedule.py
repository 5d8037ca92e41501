"""Into how many shares the keys are split, so that few queries keep a whole GPU busy."""

from __future__ import annotations

from functools import cache

__all__ = ["MOST_SPLITS", "splits_for"]

MOST_SPLITS = 128
_LEAST_TILES = 2  # of a split: less would cost more to merge than to read
_RESIDENT = 2  # programs that a processor runs at once
_NEARLY = 0.85


@cache
def splits_for(programs: int, tiles: int, processors: int) -> int:
    """The fewest splits of the keys that fill the processors nearly as well as any number does.

    Programs run in waves of as many as there is room for, and the last wave may be nearly empty;
    this is the rule of FlashAttention (``num_splits_heuristic`` in hopper/heuristics.h). Only
    shapes are asked, which the host knows without waiting for the device.

    Args:
        programs: That there are without splits.
        tiles: Of keys, in the whole cache.
        processors: Of the device.
    """
    room = _RESIDENT * processors
    most = max(1, min(MOST_SPLITS, room, tiles // _LEAST_TILES))
    filled = [
        programs * splits / (-(-programs * splits // room) * room) for splits in range(1, most + 1)
    ]
    enough = _NEARLY * max(filled)
    return 1 + next(index for index, share in enumerate(filled) if share >= enough)
