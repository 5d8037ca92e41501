"""The plots of a report: cache against KL, lost energy, similarity of layers.

Shares are drawn in the map cividis, which colour-blind readers can tell apart; models differ in
their markers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from typing import TYPE_CHECKING, Any

from convert.reporting.conversions import (
    Conversion,
    LatentConversion,
    LatentLayer,
    Layer,
    MergedConversion,
)
from convert.reporting.figures import COLOURS, MARKERS, figure_of, short
from convert.reporting.rows import Row
from kvpatch.memory import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["latent_energy", "lost_energy", "pareto", "similarity"]

_PREDICTED, _MEASURED = COLOURS[:2]
# title, value of a layer, its unit and how many of those make 1, colour; drawn where it is known
_Line = tuple[str, str, str, float, str]
_KL_LINE: _Line = ("measured:\nattention KL", "attention_kl", "nats", 1, _MEASURED)
_ERROR_LINE: _Line = (
    "measured:\noutput error",
    "output_error",
    "% of the power",
    100,
    _MEASURED,
)
_MERGED_LINES: tuple[_Line, ...] = (
    ("predicted:\nlost key energy", "lost_energy_k", "%", 100, _PREDICTED),
    _KL_LINE,
    ("predicted:\nlost value energy", "lost_energy_v", "%", 100, _PREDICTED),
    _ERROR_LINE,
)
_LATENT_LINES: tuple[_Line, ...] = (
    ("predicted:\nlost with the rotation", "lost_energy_rope", "% of the keys", 100, _PREDICTED),
    _KL_LINE,
    ("predicted:\nlost in the latent", "lost_energy_latent", "%", 100, _PREDICTED),
    ("predicted:\nin no input shared", "lost_energy_shared", "%", 100, _PREDICTED),
    _ERROR_LINE,
)
_KL_TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
_LINEAR_KL = 0.01  # below it the KL axis is linear, so that it can show 0
_SHARE_TICKS = (0, 0.02, 0.1, 0.25, 0.5, 1)
_MOST_SIZES = 6  # tick labels that fit on the axis of cache sizes
_MOST_NUMBERS = 16  # rows and columns of a heat map whose cells still have room for numbers


def pareto(rows: Sequence[Row]) -> Figure:
    """Cache size against KL, one panel for each setting of the measurement.

    Args:
        rows: From ``pareto_rows``.
    """
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(_setting(row), []).append(row)
    models = list(dict.fromkeys(row["model"] for row in rows if row["role"] == "conversion"))
    longest = max(len(_look(row, models)["label"]) for row in rows)
    columns = min(3, len(settings))
    lines = ceil(len(settings) / columns)
    width = 4.6 * columns + 0.085 * longest + 0.6
    height = max(4.2 * lines, 0.23 * len(models) + 1.4)
    figure = figure_of(width, height, "KV cache against distance from the source")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, (setting, measured) in zip(panels, settings.items(), strict=False):
        _pareto_panel(panel, measured, models)
        panel.set_title(setting)
    for panel in panels[len(settings) :]:
        panel.set_axis_off()
    handles = {str(line.get_label()): line for panel in panels for line in panel.lines}
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    return figure


def _setting(row: Row) -> str:
    return (
        f"{short(row['text'])}\n{row['windows']} windows of {row['context']} tokens, "
        f"stride {row['stride']}, {row['dtype']}"
    )


def _pareto_panel(panel: Axes, rows: Sequence[Row], models: Sequence[str]) -> None:
    _draw_front(panel, [row for row in rows if row["front"]])
    for row in rows:
        panel.plot(
            row["kv_bytes_per_token"],
            row["kl"],
            linestyle="none",
            markeredgecolor="none",
            clip_on=False,
            zorder=3,
            **_look(row, models),
        )
    _size_axis(panel, rows)
    _kl_axis(panel, max(row["kl"] for row in rows))
    panel.grid()
    panel.set_axisbelow(True)


def _draw_front(panel: Axes, rows: Sequence[Row]) -> None:
    front = sorted((row["kv_bytes_per_token"], row["kl"]) for row in rows)
    panel.step(
        *zip(*front, strict=True),
        where="post",
        color="0.6",
        marker="o",
        markersize=14,
        markerfacecolor="none",
        clip_on=False,  # the source lies on the axis
        label="Pareto front",
    )


def _look(row: Row, models: Sequence[str]) -> dict[str, Any]:
    if row["role"] == "source":
        from matplotlib import rcParams  # noqa: PLC0415

        label = f"{short(row['model'])} (source)"
        return {
            "label": label,
            "color": rcParams["text.color"],
            "marker": "*",
            "markersize": 12,
        }
    index = models.index(row["model"])
    return {
        "label": short(row["model"]),
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 7,
    }


def _kl_axis(panel: Axes, highest: float) -> None:
    """Logarithmic, but linear near 0, where the source is."""
    panel.set_yscale("symlog", linthresh=_LINEAR_KL, linscale=0.5)
    panel.set_ylim(0, max(_LINEAR_KL, 1.4 * highest))
    top = panel.get_ylim()[1]
    ticks = [tick for tick in _KL_TICKS if tick <= top]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_yticks([], minor=True)
    panel.set_ylabel("KL(source ‖ model), nats per token")


def _size_axis(panel: Axes, rows: Sequence[Row]) -> None:
    """Halvings of the source's cache as ticks."""
    sizes = [row["kv_bytes_per_token"] for row in rows]
    full = next(row["kv_bytes_per_token"] for row in rows if row["role"] == "source")
    halvings = max(1, ceil(log2(full / min(sizes))))
    parts = [2**power for power in range(0, halvings + 1, ceil((halvings + 1) / _MOST_SIZES))]
    panel.set_xscale("log", base=2)
    panel.set_xlim(min(full / 2, *sizes) / 1.15, max(sizes) * 1.15)
    panel.set_xticks(
        [full / part for part in parts],
        [f"{format_bytes(full / part)}\n{f'1/{part}' if part > 1 else 'source'}" for part in parts],
    )
    panel.set_xticks([], minor=True)
    panel.set_xlabel("KV cache per token (share of the source's)")


def lost_energy(conversion: MergedConversion) -> Figure:
    """Lost energy of each layer and head, and of each layer beside what was measured of it."""
    layers = conversion.layers
    maps = (
        ("keys", [layer.lost_heads_k for layer in layers]),
        ("values", [layer.lost_heads_v for layer in layers]),
    )
    lines = _known(_MERGED_LINES, layers[0])
    heads = len(layers[0].lost_heads_k)
    width = min(6.0, max(2.4, 0.34 * heads))
    title = (
        f"{short(conversion.name)} ({conversion.recipe.method}, merge "
        f"{conversion.recipe.merge}): energy that merging lost"
    )
    figure = figure_of(2 * width + 1.45 * len(lines) + 0.6, _height(len(layers)), title)
    ratios = [width, width] + [1.2] * len(lines)
    panels = figure.subplots(1, len(ratios), sharey=True, gridspec_kw={"width_ratios": ratios})
    for panel, (part, shares) in zip(panels, maps, strict=False):
        _lost_map(panel, shares)
        panel.set_title(f"{part}: lost share of each head, %")
        panel.set_xlabel("KV head of the source")
    _layer_axis(panels[0], conversion)
    highest = max(share for _, shares in maps for line in shares for share in line)
    _share_bar(figure, panels[:2], highest=highest)
    _draw_lines(panels[2:], lines, layers)
    return figure


def latent_energy(conversion: LatentConversion) -> Figure:
    """What each layer lost of its rotation and in its latent, beside what was measured of it."""
    layers = conversion.layers
    lines = _known(_LATENT_LINES, layers[0])
    title = f"{short(conversion.name)} (mla, {_sizes(layers)}):\nenergy that was lost"
    figure = figure_of(1.75 * len(lines) + 1.2, _height(len(layers)), title)
    panels = figure.subplots(1, len(lines), sharey=True)
    _layer_axis(panels[0], conversion)
    panels[0].set_ylim(len(layers) - 0.5, -0.5)
    _draw_lines(panels, lines, layers)
    return figure


def _sizes(layers: Sequence[LatentLayer]) -> str:
    """Sizes of all layers, ``rank 512 + 64 rotary``, with ranges where they differ."""
    ranks, rope = ([getattr(layer, key) for layer in layers] for key in ("rank", "rope_dims"))
    least, most = min(ranks), max(ranks)
    rank = f"{most}" if least == most else f"{least} to {most}"
    return f"rank {rank} + {max(rope)} rotary"


def _known(lines: Sequence[_Line], layer: Layer) -> list[_Line]:
    return [line for line in lines if getattr(layer, line[1]) is not None]


def _draw_lines(panels: Sequence[Axes], lines: Sequence[_Line], layers: Sequence[Layer]) -> None:
    for panel, (name, key, unit, scale, colour) in zip(panels, lines, strict=True):
        values = [scale * getattr(layer, key) for layer in layers]
        panel.plot(values, range(len(layers)), color=colour, marker="o", markersize=4)
        panel.set_xlim(0, 1.1 * max(values) or 1)
        panel.set_title(name, color=colour)
        panel.set_xlabel(unit)
        panel.grid()
        panel.locator_params(axis="x", nbins=3)


def _height(layers: int) -> float:
    return min(14.0, max(3.4, 0.3 * layers + 1.9))


def _lost_map(panel: Axes, shares: Sequence[Sequence[float]]) -> None:
    """A heat map whose colours mean the same in every report: shares from 0 to 1."""
    from matplotlib.colors import PowerNorm  # noqa: PLC0415

    panel.imshow(
        shares, aspect="auto", interpolation="nearest", cmap="cividis", norm=PowerNorm(0.5, 0, 1)
    )
    _numbers(panel, shares, dark_below=0.3)
    panel.set_xticks(range(0, len(shares[0]), ceil(len(shares[0]) / 16)))


def _share_bar(figure: Figure, panels: Sequence[Axes], *, highest: float) -> None:
    width, height = 4.5, 0.15  # inches, if the maps are as wide
    maps = figure.get_figheight() - 1.6
    bar = figure.colorbar(
        panels[0].images[0],
        ax=panels,
        location="bottom",
        fraction=height / maps,
        aspect=width / height,
        extend="max" if highest > 1 else "neither",
        label="lost share of a head's energy",
    )
    bar.set_ticks(_SHARE_TICKS, labels=[f"{100 * tick:g} %" for tick in _SHARE_TICKS])


def _layer_axis(panel: Axes, conversion: Conversion) -> None:
    """Layers from top to bottom; an arrow comes from the layer whose keys one reads."""
    layers = conversion.layers
    step = ceil(len(layers) / (4.5 * _height(len(layers))))
    panel.set_yticks(
        [layer.layer for layer in layers[::step]],
        [
            f"{layer.layer}" if layer.source == layer.layer else f"{layer.source} → {layer.layer}"
            for layer in layers[::step]
        ],
    )
    shares = any(layer.source != layer.layer for layer in layers)
    panel.set_ylabel("layer (a → b: b reads from a)" if shares else "layer")


def _numbers(panel: Axes, shares: Sequence[Sequence[float]], *, dark_below: float) -> None:
    """Per cent in the cells of a heat map, if there is room."""
    if max(len(shares), len(shares[0])) > _MOST_NUMBERS:
        return
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            colour = "white" if share < dark_below else "black"
            text = f"{100 * share:.{0 if share >= 0.0995 else 1}f}"
            panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


def similarity(conversion: Conversion) -> Figure:
    """How alike the attention inputs of each two layers are; layers that share are framed."""
    shares = conversion.similarity
    assert shares is not None
    count = len(shares)
    side = min(11.0, max(3.6, 0.42 * count + 1.2))
    title = f"{short(conversion.name)}:\nsimilarity of the source's attention inputs"
    figure = figure_of(side + 1.4, side + 0.8, title)
    panel = figure.subplots()
    image = panel.imshow(shares, interpolation="nearest", cmap="cividis", vmin=0, vmax=1)
    _numbers(panel, shares, dark_below=0.5)
    _frame_sharing(panel, conversion.layers)
    step = ceil(count / 24)
    panel.set_xticks(range(0, count, step))
    panel.set_yticks(range(0, count, step))
    note = "\n(framed: it reads the keys and values of the row's layer)"
    panel.set_xlabel("layer" + note * bool(panel.patches))
    panel.set_ylabel("layer")
    bar = figure.colorbar(image, ax=panel, shrink=0.8, label="linear centred kernel alignment")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    return figure


def _frame_sharing(panel: Axes, layers: Sequence[Layer]) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    for layer in layers:
        if layer.source != layer.layer:
            corner = (layer.layer - 0.5, layer.source - 0.5)
            panel.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_MEASURED, linewidth=2))
