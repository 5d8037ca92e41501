"""Figures of matplotlib without a window or global state, and the look that all of them share.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from convert.console import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "figure_of", "render", "render_svg", "short"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# what matplotlib would write of itself or of the time, by format
_METADATA: Mapping[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}}
_SETTINGS: Mapping[Any, Any] = {
    "svg.hashsalt": "kvpatch",
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "grid.color": "0.92",
}


def render(draw: Callable[[], Figure]) -> dict[str, bytes]:
    """A drawing as ``png`` and ``svg``, whose bytes depend on what is drawn alone."""
    with _our_settings({}):
        figure = draw()
        return {suffix: _saved(figure, suffix) for suffix in _METADATA}


def render_svg(draw: Callable[[], Figure], look: Mapping[Any, Any]) -> bytes:
    """A drawing as SVG, with a look of its own.

    Args:
        draw: Makes the figure.
        look: Settings of matplotlib.
    """
    with _our_settings(look):
        return _saved(draw(), "svg")


def _saved(figure: Figure, suffix: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=150, metadata=_METADATA[suffix])
    return buffer.getvalue()


@contextmanager
def _our_settings(look: Mapping[Any, Any]) -> Iterator[None]:
    """Settings of our own, whatever the user's matplotlibrc says."""
    import matplotlib as mpl  # noqa: PLC0415

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_SETTINGS, **look})
        yield


def figure_of(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def short(name: str, most: int = 36) -> str:
    """A name that fits into a legend or title: of a long one both ends, which differ most.

    Characters that the font has no glyph for are spelled out. A font of the machine might have
    one, but then the same report would not have the same bytes everywhere.
    """
    parts = [_spelled(character) for character in visible(name)]
    if sum(map(len, parts)) <= most:
        return "".join(parts)
    half = (most - 1) // 2
    start, end = _first(parts, half), _first(parts[::-1], half)
    return f"{''.join(start)}…{''.join(reversed(end))}"


def _first(parts: Sequence[str], most: int) -> list[str]:
    """As many of the first parts as have ``most`` characters in all."""
    lengths = accumulate(map(len, parts))
    return [part for part, length in zip(parts, lengths, strict=True) if length <= most]


def _spelled(character: str) -> str:
    drawn = ord(character) in _glyphs()
    return character if drawn else character.encode("unicode_escape").decode()


@cache
def _glyphs() -> frozenset[int]:
    """Code points that the default font can draw; it comes with matplotlib."""
    from matplotlib.font_manager import findfont, get_font  # noqa: PLC0415

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
