"""Options and output that the verbs of the command line share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.errors import UserError
from common.provenance import source_root
from common.rundir import RunDirectory

ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A TOML file, or a shipped one: demo-tiny.toml, demo.toml, hospitals-dp.toml, "
        "hospitals.toml, paper.toml.",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, for instance adapter.rank=32.")
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="New folder for everything the run writes.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, last, on standard output.")
]


def find_config(name: Path) -> Path:
    """Return a configuration file: as named, or the shipped one (``NAME`` or ``configs/NAME``).

    Raises:
        UserError: if there is neither.
    """
    if name.is_file():
        return name
    shipped = source_root() / "configs"
    candidate = shipped / name.name
    if str(name.parent) in (".", "configs") and name.suffix == ".toml" and candidate.is_file():
        return candidate
    names = ", ".join(sorted(file.name for file in shipped.glob("*.toml")))
    raise UserError(
        f"there is no configuration file {name}",
        allowed=f"a TOML file, or a shipped one: {names}",
        fix="check the path",
    )


def open_run(path: Path) -> RunDirectory:
    """Open a run that has checkpoints and answers of its own.

    Raises:
        UserError: if there is none, or it is a paper run: those lie inside.
    """
    run = RunDirectory.open(path)
    ranks = run.read_json("environment.json").get("ranks", [])
    if ranks:
        from sim.runs.paper_table import rank_folder

        inside = [str(path / rank_folder(rank)) for rank in ranks]
        raise UserError(
            f"{path} is a paper run, with one run for each rank inside",
            allowed=", ".join(inside),
            fix=f"name one of them, for instance {inside[0]}",
        )
    return run


def console_for(json_output: bool) -> Console:
    """Return the console for people; standard output stays free for JSON when asked for."""
    return Console(stderr=json_output, soft_wrap=True)


def print_json(value: Any, wanted: bool) -> None:
    """Print one JSON document for scripts, if it was asked for."""
    if wanted:
        print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
