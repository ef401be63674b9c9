"""``fedrx generalise``: what hospitals gain, on the terminal and on a page with maps and curves."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import RenderableType
from rich.table import Column, Table

from common.data.handling import handling_of
from common.evaluation.transfer import Measured, Value
from sim.report.html import Block, write_page
from sim.report.plots import heat_map_svg, lines_svg
from sim.report.words import NOTICE, number

HEADERS = ("hospital", "patients", "alone", "together", "gain", "absent", "gain by being there")
NOTE = (
    "Alone: the model that the hospital trained by itself. Together: that of all hospitals. "
    "Absent: that of all the others, as a hospital finds it that was not there. Gains are paired "
    "by patient, and above 0 where together is better. In brackets: 95% bootstrap intervals over "
    "patients; ±: over seeds (Student's t), which says how much training itself varies. Each "
    "hospital's lists are of its own formulary and cut on its own validation patients, whoever "
    "trained the model."
)


def write_transfer_page(
    page: Path, source: str, seeds: int, measures: Mapping[str, Measured]
) -> Path:
    """Write the page and its markdown twin.

    Args:
        page: The page.
        source: Of the data.
        seeds: Models of each kind.
        measures: By the metric's name.
    """
    blocks = [
        Block(note=f"{NOTICE} {handling_of(source).report}", warning=True),
        Block(note=_lead(measures), lead=True),
    ]
    note = f"{NOTE} {seeds} seed(s)."
    for name, one in measures.items():
        title = f"What a hospital gains: {name}"
        blocks.append(Block(title=title, note=note, headers=HEADERS, rows=tuple(_rows(one))))
        note = ""
    blocks += [_worst(measures), _maps(measures), *_curves(measures)]
    return write_page(page, "FedRx: what federation is worth", blocks)


def transfer_parts(measures: Mapping[str, Measured]) -> Iterator[RenderableType]:
    """Return a table for each metric, and what they say."""
    for name, one in measures.items():
        table = Table(*(Column(header, overflow="fold") for header in HEADERS), title=name)
        for at in one.hospitals:
            levels = [number(v.value if v else None) for v in (at.alone, at.together, at.absent)]
            gains = [estimate(v, signed=True).partition(" ±")[0] for v in (at.gain, at.presence)]
            cells = (*levels[:2], gains[0], levels[2], gains[1])
            table.add_row(at.hospital, str(at.patients), *cells)
        yield table
    yield _lead(measures)


def estimate(value: Value | None, *, signed: bool = False) -> str:
    """Format a value with both intervals.

    >>> estimate(Value(value=0.5, low=0.4, high=0.6, over_seeds=0.01)), estimate(None)
    ('0.500 (0.400 to 0.600) ±0.010', '–')
    """
    if value is None:
        return "–"
    sign = "+" if signed else ""
    text = f"{value.value:{sign}.3f}"
    if value.low is not None and value.high is not None:
        text += f" ({value.low:{sign}.3f} to {value.high:{sign}.3f})"
    return text if value.over_seeds is None else f"{text} ±{value.over_seeds:.3f}"


def _lead(measures: Mapping[str, Measured]) -> str:
    parts = []
    for name, one in measures.items():
        gains = [at.gain for at in one.hospitals if at.gain]
        sure = sum(1 for gain in gains if gain.low is not None and gain.low > 0)
        worse = sum(1 for gain in gains if gain.high is not None and gain.high < 0)
        parts.append(
            f"By {name}, {sure} of {len(gains)} hospitals do better with the others than alone, "
            f"and {worse} worse, by intervals over patients that exclude 0."
        )
    return " ".join(parts)


def _rows(one: Measured) -> list[tuple[str, ...]]:
    return [
        (
            at.hospital,
            str(at.patients),
            estimate(at.alone),
            estimate(at.together),
            estimate(at.gain, signed=True),
            estimate(at.absent),
            estimate(at.presence, signed=True),
        )
        for at in one.hospitals
    ]


def _worst(measures: Mapping[str, Measured]) -> Block:
    rows = tuple(
        (name, one.kind, one.hospital, estimate(one.value))
        for name, measured in measures.items()
        for one in measured.worst
    )
    headers = ("metric", "model", "hospital", "value")
    return Block(title="The worst hospital", headers=headers, rows=rows)


def _maps(measures: Mapping[str, Measured]) -> Block:
    svgs = []
    for name, one in measures.items():
        columns = list(next(iter(one.matrix.values())))
        values = [
            [None if cell is None else cell.value for cell in row.values()]
            for row in one.matrix.values()
        ]
        svgs.append(
            heat_map_svg(values, list(one.matrix), columns, label=name, dark_is_high=name != "loss")
        )
    rows = tuple(
        (name, trained, *(number(cell.value if cell else None) for cell in row.values()))
        for name, one in measures.items()
        for trained, row in one.matrix.items()
    )
    note = "Rows: who trained the model. Columns: whose held-out patients. Darker is better."
    headers = ("metric", "trained by", *next(iter(next(iter(measures.values())).matrix.values())))
    return Block(
        title="Every model at every hospital",
        note=note,
        svgs=tuple(svgs),
        headers=headers,
        rows=rows,
    )


def _curves(measures: Mapping[str, Measured]) -> list[Block]:
    svgs, rows = [], []
    kinds = {"everybody": "all patients", "inside": "of its hospitals", "outside": "of others"}
    for name, one in measures.items():
        lines = {
            label: [
                (float(size.hospitals), value.value)
                for size in one.curve
                if (value := getattr(size, kind))
            ]
            for kind, label in kinds.items()
        }
        present = {label: points for label, points in lines.items() if points}
        svgs.append(lines_svg(present, x_label="hospitals that trained it", y_label=name))
        rows += [
            (
                name,
                str(size.hospitals),
                str(size.models),
                *(estimate(getattr(size, k)) for k in kinds),
            )
            for size in one.curve
        ]
    note = (
        "Models of one hospital, of all but one, and, in between, of hospitals added one by one, "
        "beginning with another one in every seed. Of others: patients of hospitals that were not "
        "there."
    )
    headers = ("metric", "hospitals", "models", *kinds.values())
    title = "How many hospitals"
    return [Block(title=title, note=note, svgs=tuple(svgs), headers=headers, rows=tuple(rows))]
