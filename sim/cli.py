"""The command ``fedrx``: the only place that prints."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.configio import read_config
from common.errors import FedrxError, UserError
from common.provenance import source_root

app = typer.Typer(
    name="fedrx",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hospitals fine-tune one frozen Llama together and share only B. "
    "Research only, not for clinical use.",
)

SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, for instance adapter.rank=32.")
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="New folder for everything the run writes.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print summary.json's content last, on standard output.")
]


def find_config(name: Path) -> Path:
    """Return a configuration file: as named, or the shipped one of that name.

    Raises:
        UserError: if there is neither.
    """
    if name.is_file():
        return name
    shipped = source_root() / "configs"
    candidate = shipped / name.name
    if candidate.suffix == ".toml" and candidate.is_file():
        return candidate
    names = ", ".join(sorted(file.name for file in shipped.glob("*.toml")))
    raise UserError(
        f"there is no configuration file {name}",
        allowed=f"a TOML file, or a shipped one: {names}",
        fix="check the path",
    )


def console_for(json_output: bool) -> Console:
    """Return the console for people; standard output stays free for JSON when asked for."""
    return Console(stderr=json_output, soft_wrap=True)


def finish(summary: dict[str, Any], json_output: bool) -> None:
    """Print the summary for scripts."""
    if json_output:
        print(json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False))


@app.command()
def demo(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A tiny random Llama: a minute instead of minutes.")
    ] = False,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Run the main job on synthetic data: three hospitals, a small Llama, a report."""
    from sim.federate import federate

    name = Path("demo-tiny.toml" if tiny else "demo.toml")
    config = read_config(source_root() / "configs" / name, set_ or ())
    console = console_for(json_output)
    finish(federate(config, console=console, command_line=sys.argv, run_dir=run_dir), json_output)


@app.command()
def federate(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG")],
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train hospitals together in a simulation (Flower on Ray)."""
    from sim.federate import federate as run_federation

    config = read_config(find_config(config_file), set_ or ())
    console = console_for(json_output)
    summary = run_federation(config, console=console, command_line=sys.argv, run_dir=run_dir)
    finish(summary, json_output)


@app.command()
def single(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG")],
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train on one node that holds everything: the paper's mode."""
    from sim.single import single as run_single

    config = read_config(find_config(config_file), set_ or ())
    console = console_for(json_output)
    summary = run_single(config, console=console, command_line=sys.argv, run_dir=run_dir)
    finish(summary, json_output)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Its run directory.")],
    set_: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Go on with an interrupted or killed run, to the same end."""
    from sim.resume import resume as resume_run

    console = console_for(json_output)
    finish(resume_run(run, set_ or (), console=console, command_line=sys.argv), json_output)


def main() -> None:
    """Run the command line; user errors are one line and exit status 2, failed runs 1."""
    try:
        app()
    except FedrxError as error:
        print(f"fedrx: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("fedrx: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
