"""The report's plots, as inline SVG that refers to nothing outside itself."""

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
MOST_LABELS = 8
HOSPITAL_COLOURS = [
    "#c05621",
    "#2f855a",
    "#6b46c1",
    "#b83280",
    "#0987a0",
    "#975a16",
    "#4a5568",
    "#9b2c2c",
]


def loss_svg(events: Sequence[dict[str, Any]]) -> str:
    """Plot validation loss over rounds (or steps): the mean, and each hospital."""
    unit = "round" if any("round" in event for event in events) else "step"
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        lines[event.get("hospital", "")].append((event[unit], event["value"]))
    figure, axes = _axes(f"{unit}s" if unit == "step" else unit, "validation loss")
    hospitals = sorted(name for name in lines if name)
    few = len(hospitals) <= MOST_LABELS
    for index, name in enumerate(hospitals):
        label = name if few else ("hospitals" if index == 0 else None)
        colour = HOSPITAL_COLOURS[index] if few else GREY
        axes.plot(*zip(*sorted(lines[name]), strict=True), color=colour, linewidth=1, label=label)
    if "" in lines:
        axes.plot(
            *zip(*sorted(lines[""]), strict=True),
            color=BLUE,
            linewidth=2.2,
            marker="o",
            label="mean",
        )
    axes.legend(frameon=False)
    return inline_svg(figure)


def bytes_svg(lines: Sequence[dict[str, Any]]) -> str:
    """Plot megabytes per round in both directions."""
    totals: dict[str, dict[int, int]] = {"up": defaultdict(int), "down": defaultdict(int)}
    for line in lines:
        totals[line["direction"]][line["round"]] += line["bytes"]
    rounds = sorted({line["round"] for line in lines})
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


def epsilon_svg(lines: Sequence[dict[str, Any]], unit: str) -> str:
    """Plot spent epsilon over rounds (or steps) for each hospital."""
    spent: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        if math.isfinite(float(line["epsilon"])):
            spent[line["hospital"]].append((line["round"], float(line["epsilon"])))
    figure, axes = _axes(unit, "epsilon spent")
    for name in sorted(spent):
        axes.plot(*zip(*sorted(spent[name]), strict=True), marker="o", label=name)
    axes.set_ylim(bottom=0)
    if 0 < len(spent) <= MOST_LABELS:
        axes.legend(frameon=False)
    return inline_svg(figure)


def framed(
    x_label: str, y_label: str, *, width: float = 8.5, height: float = 3.8
) -> tuple[Figure, Axes]:
    """Return a figure (in inches) with labelled axes and no box around them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def inline_svg(figure: Figure) -> str:
    """Return a figure as an element of a page."""
    text = rendered(figure, "svg").decode()
    return text[text.index("<svg") :]


def rendered(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """Draw a figure; no date and a fixed salt for ids: an equal one gives equal bytes."""
    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": "fedrx"}):
        figure.savefig(
            stream, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {}
        )
    return stream.getvalue()


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure, axes = framed(x_label, y_label, width=7.2, height=3.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A nearly constant loss reads as itself, not as differences from an offset.
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color="#e2e8f0")
    axes.set_axisbelow(True)
    return figure, axes
