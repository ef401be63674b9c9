"""The verbs around a run: plan, sweep, evaluate, export."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from common.configio import read_config
from common.errors import UserError
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
from sim.process.open_run import open_run


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
    from sim.checks.plan import show_plan

    found = plan_run(config, card_bytes=None if card_gb is None else int(card_gb * 1e9))
    show_plan(console_for(json_output), found)
    print_json(found.as_json(), json_output)


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
    if not arms:
        arms, reasons = default_arms(config)
        for reason in reasons:
            console.print(reason, style="yellow", markup=False, highlight=False)
    cells = plan_cells(config, arms=arms, seeds=range(seeds), vary=vary or ())
    if dry_run:
        for cell in cells:
            console.print(cell.folder, markup=False, highlight=False)
        console.print(f"{len(cells)} runs")
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
    console_for(False).print(f"{layout}: {folder}", markup=False, highlight=False)


def _ask(hospital: str) -> None:
    """Let a person agree that a personal adapter is written."""
    what = f"The own B of {hospital} was trained without noise and is for {hospital} alone."
    if not sys.stdin.isatty():
        raise UserError(f"--personal: {what}", allowed="a person's yes", fix="add --yes")
    if not typer.confirm(f"{what} Write it?"):
        raise UserError("nothing was written", fix="leave --personal out, or say yes")
