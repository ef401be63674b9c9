"""Options and output that the verbs of the command line share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import UserError
from common.provenance import source_root
from sim.cli.terminal import Terminal

ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A TOML file, or a shipped one: demo-tiny.toml, demo.toml, hospitals-dp.toml, "
        "hospitals.toml, paper.toml.",
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="Name of a checkpoint; default the last.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, for instance adapter.rank=32.")
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="New folder for everything the run writes.")
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="ray: Flower on Ray; in-process: this process alone, for a debugger, or for all runs "
        "of a sweep.",
    ),
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


def with_backend(overrides: list[str] | None, backend: str | None) -> list[str]:
    """Return the overrides with ``--backend`` among them.

    >>> with_backend(["adapter.rank=4"], "in-process")
    ['adapter.rank=4', 'run.backend=in-process']
    """
    return [*(overrides or ()), *([f"run.backend={backend}"] if backend else ())]


def console_for(json_output: bool) -> Terminal:
    """Return the console for people; standard output stays free for JSON when asked for."""
    return Terminal(stderr=json_output)


def print_json(value: Any, wanted: bool) -> None:
    """Print one JSON document for scripts, if it was asked for."""
    if wanted:
        print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
