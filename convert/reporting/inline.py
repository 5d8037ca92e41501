"""Plots inside an HTML page: SVG elements in the page's own colours, which follow its theme."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from convert.reporting.figures import COLOURS, render_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["inline_svg"]

# colours that no plot uses stand for those of the page until the plot is drawn
_INK, _GRID = "#010203", "#020304"
_LOOK: Mapping[str, str] = {
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
    "grid.color": _GRID,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_VARIABLES = {
    _INK: "var(--ink)",
    _GRID: "var(--line)",
    **{colour.lower(): f"var(--series-{index})" for index, colour in enumerate(COLOURS)},
}
_COLOUR = re.compile("|".join(_VARIABLES))
_URL = "url(#"
_DROPPED = {"metadata", "style", "title"}


def inline_svg(draw: Callable[[], Figure], *, prefix: str, alt: str) -> str:
    """A plot as an ``<svg>`` element of HTML; equal plots give equal text.

    Args:
        draw: Makes the figure.
        prefix: Starts its ids, which must be unique in a page.
        alt: What it shows.
    """
    svg = ElementTree.fromstring(render_svg(draw, _LOOK))  # noqa: S314 - matplotlib's, not a user's
    width = svg.attrib["width"]
    for element in list(svg.iter()):
        for child in [child for child in element if _plain(child.tag) in _DROPPED]:
            element.remove(child)
        element.tag = _plain(element.tag)
        for key in list(element.attrib):
            value = element.attrib.pop(key)
            element.attrib[_plain(key)] = _for_page(_plain(key), value, prefix)
    svg.attrib = {
        "viewBox": svg.attrib["viewBox"],
        "class": "plot",
        "style": f"width: {width}",
        "role": "img",
        "aria-label": alt,
    }
    return ElementTree.tostring(svg, encoding="unicode")


def _plain(name: str) -> str:
    """A name without its namespace, which HTML knows by itself."""
    return name.rpartition("}")[2]


def _for_page(key: str, value: str, prefix: str) -> str:
    """A value of an attribute: ids are told apart, and colours those of the page."""
    if key == "id":
        return prefix + value
    if key == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    if key == "style":
        value = _COLOUR.sub(lambda found: _VARIABLES[found.group()], value)
    return value.replace(_URL, _URL + prefix)
