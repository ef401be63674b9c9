"""The verbs around a run: plan, sweep, evaluate, export."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Column, Table

from common.configio import read_config
from common.errors import UserError
from common.records.checks import PlanRecord
from sim.cli.options import (
    BackendOption,
    CheckpointOption,
    ConfigArgument,
    JsonOption,
    RunArgument,
    RunDirOption,
    SetOption,
    console_for,
    find_config,
    print_json,
    with_backend,
)
from sim.cli.terminal import Terminal
from sim.process.open_run import open_run

SMALLEST_SHOWN_BYTES = 5_000_000
"""Below, a part would be shown as 0.00 GB."""


def plan(
    config_file: ConfigArgument,
    set_: SetOption = None,
    card_gb: Annotated[
        float | None, typer.Option("--card-gb", min=1, help="Memory of the card to fit, in GB.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Say what a run would need before anything runs: memory by part, bytes, steps, epsilon."""
    config = read_config(find_config(config_file), set_ or ())
    from sim.checks.plan import plan as plan_run

    found = plan_run(config, card_bytes=None if card_gb is None else int(card_gb * 1e9))
    show_plan(console_for(json_output), found)
    print_json(found.as_json(), json_output)


def show_plan(console: Terminal, found: PlanRecord) -> None:
    """Print a plan as people read it."""
    from common.model.adapter.scheme import A
    from common.model.adapter.spec import SCHEMES
    from common.privacy.forecast import lines
    from sim.checks.plan import PARTS

    say = console.say
    counts, parts, chosen = found.parameters, found.memory_bytes, found.recompute
    frozen = "" if A in SCHEMES[found.adapter.mode].held else " (frozen)"
    say(f"{found.backbone}: {counts.backbone:,} parameters; A {counts.a:,}{frozen}, B {counts.b:,}")
    title = f"memory of one worker at the peak of a step of {found.batch_tokens:,} tokens"
    table = Table("part", Column("GB", justify="right"), "holds", title=title)
    shown = {name: size for name, size in parts.items() if size >= SMALLEST_SHOWN_BYTES}
    for name, size in shown.items():
        last = name == list(shown)[-2]
        table.add_row(name, f"{size / 1e9:.2f}", PARTS[name], end_section=last)
    say(table)
    totals = ", ".join(f"{choice} {size / 1e9:.1f}" for choice, size in chosen.total_bytes.items())
    say(
        f"recompute {chosen.value} ({chosen.reason}): what the backward pass computes again in "
        f"place of keeping it; GB by choice: {totals}"
    )
    workers = found.workers
    if workers.value > 1:
        together = workers.value * parts["total"] / 1e9
        say(f"{workers.value} workers ({workers.reason}): {together:.1f} GB together")
    verdict = "fits" if found.fits else "does not fit"
    say(
        f"{verdict} {found.card}: {found.spare_bytes / 1e9:+.1f} GB to spare; answering takes "
        f"{found.generation_bytes / 1e9:.1f} GB",
        style="green" if found.fits else "red",
    )
    say(
        f"{found.steps:,} steps ({found.steps_reason}); {found.bytes_per_round / 1e6:.1f} MB on "
        "the wire to train a round, up and down"
        + ("" if found.privacy else " (validation sends B down once more)")
    )
    for one in found.measured:
        say(
            f"training on one {one.card}: {one.seconds_per_step:.2f} s a full step, "
            f"{one.hours:.1f} h in all ({one.source})"
        )
    if found.privacy:
        say(*lines(found.privacy), found.privacy.delta_note)


def evaluate(
    run: RunArgument,
    checkpoint: CheckpointOption = None,
    set_: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Answer held-out patients with a checkpoint, the baselines beside."""
    from sim.runs.lifecycle import evaluate as evaluate_run

    console = console_for(json_output)
    directory = open_run(run)
    summary = evaluate_run(directory, console=console, checkpoint=checkpoint, overrides=set_ or ())
    print_json(summary.as_json(), json_output)


def sweep(
    config_file: ConfigArgument,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", help="An arm of the comparison; default: all that fit."),
    ] = None,
    vary: Annotated[
        list[str] | None, typer.Option("--vary", help="key=value,value: a grid beside the arms.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds 0, 1, ... of each arm.")] = 3,
    backend: BackendOption = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    slurm: Annotated[
        str | None,
        typer.Option("--slurm", metavar="PARTITION", help="Each run as a job on Slurm."),
    ] = None,
    slurm_set: Annotated[
        list[str] | None,
        typer.Option("--slurm-set", help="key=value of sbatch, for instance gres=gpu:1."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs only.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Compare ways of training over seeds, in one table with intervals."""
    from sim.runs.sweep import default_arms, plan_cells
    from sim.runs.sweep import sweep as run_sweep

    config = read_config(find_config(config_file), with_backend(set_, backend))
    console = console_for(json_output)
    reasons: list[str] = []
    if not arms:
        arms, reasons = default_arms(config)
    cells = plan_cells(config, arms=arms, seeds=range(seeds), vary=vary or ())
    console.say(*reasons, style="yellow")
    if dry_run:
        console.say(*(cell.folder for cell in cells), f"{len(cells)} runs")
        return
    folder = run_dir or Path("runs") / f"sweep-{config.run.name}"
    jobs = None
    if slurm is not None or slurm_set:
        from sim.runs.slurm import jobs_on

        jobs = jobs_on(slurm or "", slurm_set or ())
    table = run_sweep(cells, folder, console=console, command_line=sys.argv, jobs=jobs)
    print_json(table.as_json(), json_output)


def export(
    run: RunArgument,
    target: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; default in RUN.")
    ] = None,
    checkpoint: CheckpointOption = None,
    layout: Annotated[
        Literal["peft", "merged", "gguf"],
        typer.Option("--format", help="PEFT and vLLM, merged weights, or llama.cpp."),
    ] = "peft",
    base_model: Annotated[
        str, typer.Option("--base-model", help="Hub id of a backbone that is a local folder.")
    ] = "",
    personal: Annotated[
        str, typer.Option("--personal", help="Hospital whose own B is added; no epsilon covers it.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask about --personal.")] = False,
) -> None:
    """Write the trained adapter for others to load, with a model card."""
    from sim.runs.export import export_run

    if personal and not yes:
        _ask(personal)
    folder = export_run(
        open_run(run),
        target,
        checkpoint=checkpoint,
        layout=layout,
        base_model=base_model,
        personal=personal,
    )
    console_for(False).say(f"{layout}: {folder}")


def _ask(hospital: str) -> None:
    """Let a person agree that a personal adapter is written."""
    what = f"The own B of {hospital} was trained without noise and is for {hospital} alone."
    if not sys.stdin.isatty():
        raise UserError(f"--personal: {what}", allowed="a person's yes", fix="add --yes")
    if not typer.confirm(f"{what} Write it?"):
        raise UserError("nothing was written", fix="leave --personal out, or say yes")
