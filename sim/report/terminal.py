"""A run's result as a person reads it on the terminal."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

from common.config import Config
from common.privacy.forecast import noise_line
from common.privacy.settings import plan_of
from common.records.summary import Summary
from common.rundir import RunDirectory
from sim.report.html import Block
from sim.report.words import (
    NOTICE,
    RANDOM_WEIGHTS,
    figure,
    matrices,
    megabytes,
    model_name,
    number,
    peak_memory,
    speed,
)

LINED: dict[str, Any] = {"box": SIMPLE, "show_lines": True}
"""Looks of a table with a line between its rows and no frame."""
NARROW: dict[str, Any] = {"box": None, "pad_edge": False}
"""Looks of a table that must fit a narrow terminal."""
SHOWN = (
    ("output_rate", "output"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("jaccard", "Jaccard"),
    ("f1", "F1 (95% interval)"),
)


def summary_parts(run: RunDirectory, summary: Summary) -> list[RenderableType]:
    """Return the metrics beside the baselines, losses, privacy, the wire, where the report is."""
    parts: list[RenderableType] = []
    metrics = summary.metrics
    if metrics:
        first = next(iter(metrics.values()))
        headers = (Column(name, justify="right", no_wrap=True) for _, name in SHOWN)
        title = f"{first.samples} held-out admissions ({summary.source or '–'} data)"
        shown = Table("", *headers, title=title, caption=NOTICE)
        for model, values in metrics.items():
            cells = [number(getattr(values, key)) for key, _ in SHOWN[:-1]]
            shown.add_row(model_name(model, summary), *cells, figure(values, "f1"))
        parts.append(shown)
        if summary.backbone and summary.backbone.name == "tiny":
            parts.append(Text(RANDOM_WEIGHTS, style="yellow"))
    losses = summary.validation_loss
    if losses:
        ends = ("–" if loss is None else f"{loss:.4f}" for loss in (losses[0], losses[-1]))
        parts.append(f"validation loss {' -> '.join(ends)}")
    if public := summary.public_validation:
        ends = (f"{loss:.4f}" for _, loss in (public.losses[0], public.losses[-1]))
        made_up = f"{public.samples} made-up admissions of no hospital"
        parts.append(f"loss on {made_up} {' -> '.join(ends)}")
    parts += privacy_lines(run.config(), summary)
    wire = summary.wire
    if wire and wire.bytes_up:
        parts.append(
            f"on the wire: {matrices(summary)} only, {megabytes(wire.bytes_up)} up, "
            f"{megabytes(wire.bytes_down)} down; backbone loads {summary.backbone_loads}, "
            f"workers {summary.workers}"
        )
    took = f"{summary.seconds:.0f} s{speed(summary, ', ')}, peak memory {peak_memory(summary)}"
    return [*parts, took, f"report: {run.path / 'report.html'}"]


def block_parts(*blocks: Block) -> Iterator[RenderableType]:
    """Return what a page shows, but for its plots."""
    for block in blocks:
        if block.title:
            yield Text(f"\n{block.title}", style="bold")
        if block.rows:
            yield table(block.headers, block.rows, **NARROW)
        if block.note:
            yield Text(block.note, style="yellow" if block.warning else "")


def rule(title: str) -> Rule:
    """Return a line across the terminal, with a title in it."""
    return Rule(title)


def table(
    headers: Iterable[str],
    rows: Iterable[Iterable[str]],
    *,
    words: int | None = None,
    styles: Iterable[str] = (),
    **looks: Any,
) -> Table:
    """Return a table whose cells are shown as they are.

    Args:
        headers: Of the columns.
        rows: Their cells.
        words: How many columns come before those of figures, which stand to the right; None: all.
        styles: Of the rows, as far as there are some.
        looks: As of rich's table.
    """
    found = Table(**looks)
    for place, header in enumerate(headers):
        is_figure = words is not None and place >= words
        justify: Literal["left", "right"] = "right" if is_figure else "left"
        # A long name goes over several lines: none is cut.
        found.add_column(Text(header), justify=justify, overflow="fold")
    for row, style in zip_longest(rows, styles):
        found.add_row(*map(Text, row), style=style)
    return found


def privacy_lines(config: Config, summary: Summary) -> list[str]:
    """Say what a run's guarantee is, and how its noise compares with what it could learn."""
    privacy = summary.privacy
    if not privacy:
        return []
    ratio = plan_of(config).noise_to_signal(summary.trainable_parameters)
    return [
        (
            f"privacy of each {privacy.unit}: epsilon {float(privacy.epsilon):.3f} at delta "
            f"{privacy.delta:g}; noise multiplier {privacy.noise_multiplier:g}"
        ),
        noise_line(ratio),
    ]
