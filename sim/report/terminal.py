"""A run's result as a person reads it on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from common.config import Config
from common.privacy.forecast import verdict
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

SHOWN = (
    ("output_rate", "output"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("jaccard", "Jaccard"),
    ("f1", "F1 (95% interval)"),
)


def show_summary(console: Console, run: RunDirectory, summary: Summary) -> None:
    """Print the metrics beside the baselines, losses, privacy, the wire and where the report is."""
    metrics = summary.metrics
    if metrics:
        first = next(iter(metrics.values()))
        table = Table(
            title=f"{first.samples} held-out admissions ({summary.source or '–'} data)",
            caption=NOTICE,
        )
        table.add_column("")
        for _, name in SHOWN:
            table.add_column(name, justify="right", no_wrap=True)
        for model, values in metrics.items():
            cells = [number(getattr(values, key)) for key, _ in SHOWN[:-1]]
            table.add_row(model_name(model, summary), *cells, figure(values, "f1"))
        console.print(table)
        if summary.backbone and summary.backbone.name == "tiny":
            console.print(RANDOM_WEIGHTS, style="yellow")
    losses = summary.validation_loss
    if losses:
        ends = ("–" if loss is None else f"{loss:.4f}" for loss in (losses[0], losses[-1]))
        console.print(f"validation loss {' -> '.join(ends)}", highlight=False)
    if public := summary.public_validation:
        ends = (f"{loss:.4f}" for _, loss in (public.losses[0], public.losses[-1]))
        console.print(
            f"loss on {public.samples} made-up admissions of no hospital {' -> '.join(ends)}",
            highlight=False,
        )
    for line in privacy_lines(run.config(), summary):
        console.print(line, markup=False, highlight=False)
    wire = summary.wire
    if wire and wire.bytes_up:
        console.print(
            f"on the wire: {matrices(summary)} only, {megabytes(wire.bytes_up)} up, "
            f"{megabytes(wire.bytes_down)} down; backbone loads {summary.backbone_loads}, "
            f"workers {summary.workers}",
            highlight=False,
        )
    console.print(
        f"{summary.seconds:.0f} s{speed(summary, ', ')}, peak memory {peak_memory(summary)}",
        highlight=False,
    )
    console.print(f"report: {run.path / 'report.html'}", markup=False, highlight=False)


def show_blocks(console: Console, blocks: Sequence[Block]) -> None:
    """Print what a page shows, but for its plots."""
    for block in blocks:
        if block.title:
            console.print(f"\n{block.title}", style="bold", markup=False, highlight=False)
        if block.rows:
            table = Table(*(Column(Text(h)) for h in block.headers), box=None, pad_edge=False)
            for row in block.rows:
                table.add_row(*map(Text, row))
            console.print(table)
        if block.note:
            style = "yellow" if block.warning else None
            console.print(block.note, style=style, markup=False, highlight=False)


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
        f"noise over signal, per step: {ratio:.3g}: {verdict(ratio)}",
    ]
