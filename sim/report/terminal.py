"""A run's result as a person reads it on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from common.config import Config
from common.privacy.forecast import verdict
from common.privacy.settings import plan_of
from common.rundir import RunDirectory
from sim.report.html import Block
from sim.report.run_report import (
    NOTICE,
    RANDOM_WEIGHTS,
    matrices,
    megabytes,
    model_name,
    number,
    peak_memory,
    speed,
    with_interval,
)

SHOWN = (
    ("output_rate", "output"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("jaccard", "Jaccard"),
    ("f1", "F1 (95% interval)"),
)


def show_summary(console: Console, run: RunDirectory, summary: dict[str, Any]) -> None:
    """Print the metrics beside the baselines, losses, privacy, the wire and where the report is."""
    metrics = summary.get("metrics", {})
    if metrics:
        first = next(iter(metrics.values()))
        table = Table(
            title=f"{first['samples']} held-out admissions ({summary.get('source', '–')} data)",
            caption=NOTICE,
        )
        table.add_column("")
        for _, name in SHOWN:
            table.add_column(name, justify="right", no_wrap=True)
        for model, values in metrics.items():
            cells = [number(values.get(key)) for key, _ in SHOWN[:-1]]
            f1 = with_interval(values.get("f1"), values.get("intervals", {}).get("f1"))
            table.add_row(model_name(model, summary), *cells, f1)
        console.print(table)
        if summary["backbone"]["name"] == "tiny":
            console.print(RANDOM_WEIGHTS, style="yellow")
    losses = summary.get("validation_loss") or []
    if losses:
        first, last = ("–" if loss is None else f"{loss:.4f}" for loss in (losses[0], losses[-1]))
        console.print(f"validation loss {first} -> {last}", highlight=False)
    for line in privacy_lines(run.config(), summary):
        console.print(line, markup=False, highlight=False)
    wire = summary["wire"]
    if wire["bytes_up"]:
        console.print(
            f"on the wire: {matrices(summary)} only, {megabytes(wire['bytes_up'])} up, "
            f"{megabytes(wire['bytes_down'])} down; backbone loads {summary['backbone_loads']}, "
            f"workers {summary['workers']}",
            highlight=False,
        )
    console.print(
        f"{summary['seconds']:.0f} s{speed(summary, ', ')}, peak memory {peak_memory(summary)}",
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


def privacy_lines(config: Config, summary: dict[str, Any]) -> list[str]:
    """Say what a run's guarantee is, and how its noise compares with what it could learn."""
    privacy = summary.get("privacy")
    if not privacy:
        return []
    ratio = plan_of(config).noise_to_signal(summary["trainable_parameters"])
    return [
        (
            f"privacy of each {privacy['unit']}: epsilon {float(privacy['epsilon']):.3f} at delta "
            f"{privacy['delta']:g}; noise multiplier {privacy['noise_multiplier']:g}"
        ),
        f"noise over signal, per step: {ratio:.3g}: {verdict(ratio)}",
    ]
