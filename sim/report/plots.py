"""The pages' plots, as inline SVG that refers to nothing outside itself.

All line plots have one size: two stand side by side on a desk, one fills a phone.
"""

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from common.privacy.budget.receipts import PrivacyLine
from common.records.run import Metric, WireLine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
MOST_LABELS = 8
COLOURS = (
    *("#c05621", "#2f855a", "#6b46c1", "#b83280"),
    *("#0987a0", "#975a16", "#4a5568", "#9b2c2c"),
)
Points = Sequence[tuple[float, float]]


def loss_svg(events: Sequence[Metric], label: str = "validation loss") -> str:
    """Plot a loss over rounds (or steps): the mean, and each hospital."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.number is not None:
            lines[event.hospital or ""].append((event.place, event.number))
    mean, unit = lines.pop("", None), events[0].unit
    return lines_svg(dict(sorted(lines.items())), x_label=unit, y_label=label, mean=mean)


def lines_svg(
    lines: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    mean: Points | None = None,
    from_zero: bool = False,
    shares: bool = False,
) -> str:
    """Plot named lines; lines that coincide are drawn once, under all of their names.

    Args:
        lines: Points by name.
        x_label: What is counted.
        y_label: What is measured.
        mean: A line that stands out.
        from_zero: Begin the axis of values at zero.
        shares: End both axes at 0 and 1.
    """
    figure, axes = _axes(x_label, y_label)
    names: dict[tuple[tuple[float, float], ...], list[str]] = defaultdict(list)
    for name, points in lines.items():
        names[tuple(sorted(points))].append(name)
    few = len(names) <= MOST_LABELS
    for index, (points, named) in enumerate(names.items()):
        label = together(named) if few else (f"{len(lines)} hospitals" if index == 0 else None)
        colour = COLOURS[index] if few else GREY
        marker = "o" if len(points) <= 30 else None
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            ms=3,
            lw=1.2,
            label=label,
            clip_on=not shares,
        )
    if mean:
        marker = "o" if len(mean) <= 30 else None
        axes.plot(*zip(*sorted(mean), strict=True), color=BLUE, lw=2.2, marker=marker, label="mean")
    if from_zero:
        axes.set_ylim(bottom=0)
    if shares:
        axes.set(xlim=(0, 1), ylim=(0, 1))
    if not all(float(x).is_integer() for points in lines.values() for x, _ in points):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator())
    if len(names) + bool(mean) > 1 or any(lines):
        axes.legend(frameon=False)
    return inline_svg(figure)


def heat_map_svg(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    dark_is_high: bool = True,
) -> str:
    """Plot a table of figures as coloured cells, each with its figure; an absent one is a dash."""
    table_RC = np.array([[np.nan if v is None else v for v in row] for row in values])
    figure, axes = framed("", "", width=6.0, height=1.2 + 0.45 * len(rows))
    colours = "Blues" if dark_is_high else "Blues_r"
    mesh = axes.pcolormesh(table_RC, cmap=colours, edgecolors="white", linewidth=2)
    axes.invert_yaxis()
    axes.set_yticks([place + 0.5 for place in range(len(rows))], rows)
    axes.set_xticks([place + 0.5 for place in range(len(columns))], columns, rotation=30)
    middle = (np.nanmin(table_RC) + np.nanmax(table_RC)) / 2
    for row, column in np.ndindex(table_RC.shape):
        value = table_RC[row, column]
        dark = value > middle if dark_is_high else value < middle
        axes.text(
            column + 0.5,
            row + 0.5,
            "–" if np.isnan(value) else f"{value:.2f}",
            ha="center",
            va="center",
            color="white" if dark else "#1a202c",
        )
    figure.colorbar(mesh, ax=axes, label=label)
    return inline_svg(figure)


def together(names: Sequence[str]) -> str:
    """Name lines that coincide.

    >>> together(["a"]), together(["a", "b"]), together(["h-1", "h-2", "h-3", "h-4"])
    ('a', 'a and b, equal', 'h-1 to h-4: 4, equal')
    """
    if len(names) == 1:
        return names[0]
    if len(names) > 3:
        return f"{names[0]} to {names[-1]}: {len(names)}, equal"
    return f"{', '.join(names[:-1])} and {names[-1]}, equal"


def bytes_svg(lines: Sequence[WireLine]) -> str:
    """Plot megabytes per round in both directions."""
    totals: dict[str, dict[int, int]] = {"up": defaultdict(int), "down": defaultdict(int)}
    for line in lines:
        totals[line.direction][line.round] += line.bytes
    rounds = sorted({line.round for line in lines})
    figure, axes = _axes("round (0: handshake and first evaluation)", "MB")
    for offset, (direction, label, colour) in enumerate(
        (("up", "from hospitals", ORANGE), ("down", "to hospitals", BLUE))
    ):
        axes.bar(
            [number + 0.38 * (offset - 0.5) for number in rounds],
            [totals[direction][number] / 1e6 for number in rounds],
            width=0.38,
            color=colour,
            label=label,
        )
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    return inline_svg(figure)


def epsilon_svg(lines: Sequence[PrivacyLine], unit: str) -> str:
    """Plot spent epsilon over rounds (or steps) for each hospital."""
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        if math.isfinite(float(line.epsilon)):
            spent[line.hospital].append((line.round, float(line.epsilon)))
    ordered = dict(sorted(spent.items()))
    return lines_svg(ordered, x_label=unit, y_label="epsilon spent", from_zero=True)


def framed(
    x_label: str, y_label: str, *, width: float = 8.5, height: float = 3.8
) -> "tuple[Figure, Axes]":
    """Return a figure (in inches) with labelled axes and no box around them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def inline_svg(figure: "Figure") -> str:
    """Return a figure as an element of a page."""
    text = rendered(figure, "svg").decode()
    return text[text.index("<svg") :]


def rendered(figure: "Figure", kind: Literal["svg", "png"]) -> bytes:
    """Draw a figure; no date and a fixed salt for ids: an equal one gives equal bytes."""
    from matplotlib import rc_context

    stream = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with rc_context({"svg.hashsalt": "fedrx"}):
        figure.savefig(stream, format=kind, dpi=130, metadata=metadata)
    return stream.getvalue()


def _axes(x_label: str, y_label: str) -> "tuple[Figure, Axes]":
    from matplotlib.ticker import MaxNLocator

    figure, axes = framed(x_label, y_label, width=6.0, height=3.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A nearly constant loss reads as itself, not as differences from an offset.
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color="#e2e8f0")
    axes.set_axisbelow(True)
    return figure, axes
