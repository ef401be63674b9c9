"""The verbs about what federation is worth: generalise, contribution, forget."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from common.configio import read_config
from common.errors import UserError
from sim.cli.options import (
    JsonOption,
    RunArgument,
    RunDirOption,
    SetOption,
    console_for,
    find_config,
    print_json,
)
from sim.process.open_run import open_run


def generalise(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CONFIG", help="A federation's folder, or a TOML file as of `federate`."
        ),
    ],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Models of each kind.")] = 3,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs only.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Say what hospitals gain from each other: every model at every hospital, and who is absent."""
    from sim.runs.generalise import generalise as run_generalise
    from sim.runs.generalise import plan_models

    console, run = console_for(json_output), open_run(what) if what.is_dir() else None
    if run is None:
        config = read_config(find_config(what), set_ or ())
        folder = run_dir or Path("runs") / f"generalise-{config.run.name}"
    elif set_:
        raise UserError("--set changes nothing of a run", fix="name a configuration instead")
    else:
        config, folder = run.config(), run_dir or run.path / "generalise"
    if dry_run:
        cells = plan_models(config, seeds)
        console.say(*(cell.folder for cell in cells), f"{len(cells)} runs")
        return
    found = run_generalise(
        config, folder, seeds=seeds, console=console, command_line=sys.argv, run=run
    )
    print_json(found.as_json(), json_output)


def contribution(
    run: RunArgument,
    metric: Annotated[
        str, typer.Option("--metric", help="loss, or f1 of the lists (slower).")
    ] = "loss",
    json_output: JsonOption = False,
) -> None:
    """Say what each hospital adds to a run's model: exact Shapley values, without training."""
    from sim.checks.contribution import PAGE, shares_block
    from sim.checks.contribution import contribution as value_hospitals
    from sim.report.terminal import block_parts

    console, directory = console_for(json_output), open_run(run)
    found = value_hospitals(directory, console=console, metric=metric)
    console.say(*block_parts(shares_block(found)), f"page: {directory.path / PAGE}")
    print_json(found.as_json(), json_output)


def forget(
    run: RunArgument,
    hospital: Annotated[str, typer.Option("--hospital", help="Name of the one that leaves.")],
    json_output: JsonOption = False,
) -> None:
    """Replay a run without one hospital, and compare with a run that never had it."""
    from sim.checks.forget import B_FILE, folder_without
    from sim.checks.forget import forget as forget_hospital
    from sim.report.words import number

    console, directory = console_for(json_output), open_run(run)
    found = forget_hospital(directory, hospital, console=console, command_line=sys.argv)
    table = Table(
        "",
        "B (sha256)",
        "|B - never|",
        "loss, its patients",
        "loss, others",
        "membership ROC area",
    )
    for name, one in found.models.items():
        area = one.membership
        shown = f"{area[0]:.3f} ({area[1]:.2f}–{area[2]:.2f})" if area else "–"
        losses = number(one.loss_of_hospital), number(one.loss_of_others)
        table.add_row(name, one.b_sha256[:12], f"{one.distance:.4g}", *losses, shown)
    console.say(table)
    console.say(
        "The replay takes the hospital's updates out of every round; what the others sent was "
        "trained from a B that it had part in, so the models differ by the distance above. Loss: "
        "nats per answer token of held-out patients. Membership ROC area: how well its "
        "patients trained on are told from those it held out; 0.5 is chance.",
        style="dim",
    )
    console.say(f"replayed B: {folder_without(directory, hospital) / B_FILE}")
    print_json(found.as_json(), json_output)
