"""The command ``fedrx``: the only place that prints."""

import errno
import importlib.metadata
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click import ClickException
from click.exceptions import NoArgsIsHelpError
from rich.table import Column, Table
from rich.text import Text

from common.configio import parse_overrides, read_config
from common.errors import FedrxError, UserError
from common.provenance import source_root
from common.quick_imports import quick_imports
from sim.cli import data as cli_data
from sim.cli import deploy as cli_deploy
from sim.cli import people as cli_people
from sim.cli import runs as cli_runs
from sim.cli import worth as cli_worth
from sim.cli.options import (
    BackendOption,
    ConfigArgument,
    JsonOption,
    RunDirOption,
    SetOption,
    console_for,
    find_config,
    print_json,
    with_backend,
)

if TYPE_CHECKING:
    from common.rundir import RunDirectory

app = typer.Typer(
    name="fedrx",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does
    help="Hospitals fine-tune one frozen Llama together and share only B. "
    "Research only, not for clinical use.",
)


PATH_ERRORS = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.EROFS, errno.EINVAL, errno.ELOOP),
)
"""What another path mends; a full disk or a lost connection is a failure."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fedrx {importlib.metadata.version('fedrx')}")
        raise typer.Exit


@app.callback()
def fedrx(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Take what stands before the verb; its help is the application's own."""


@app.command()
def demo(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A tiny random Llama: a minute instead of minutes.")
    ] = False,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Run the main job on synthetic data: three hospitals, a small Llama, a report."""
    shipped = source_root() / "configs" / ("demo-tiny.toml" if tiny else "demo.toml")
    federate(shipped, set_, run_dir, backend, json_output)


@app.command()
def federate(
    config_file: ConfigArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    backend: BackendOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train hospitals together in a simulation (Flower on Ray)."""
    config = read_config(find_config(config_file), with_backend(set_, backend))
    with quick_imports():
        from sim.runs.federate import federate as run_federation

    console = console_for(json_output)
    run = run_federation(config, console=console, command_line=sys.argv, run_dir=run_dir)
    print_json(run.result.as_json(), json_output)


@app.command()
def single(
    config_file: ConfigArgument,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train on one node that holds everything: the paper's mode."""
    config = read_config(find_config(config_file), set_ or ())
    with quick_imports():
        from sim.runs.single import single as run_single

    console = console_for(json_output)
    run = run_single(config, console=console, command_line=sys.argv, run_dir=run_dir)
    print_json(run.result.as_json(), json_output)


@app.command()
def paper(
    scale: Annotated[
        str, typer.Option("--scale", help="full, or small: minutes on a CPU, marked as such.")
    ] = "full",
    ranks: Annotated[str, typer.Option("--ranks", help="Ranks, comma-separated.")] = "16,32",
    best: Annotated[
        bool | None,
        typer.Option(
            "--best/--no-best",
            help="Also the best settings found here, at the same checkpoints; --scale small has it "
            "unless told otherwise.",
        ),
    ] = None,
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Run the paper's experiment: both ranks, four checkpoints each, its table beside ours."""
    with quick_imports():
        from sim.runs.paper import paper as run_paper
        from sim.runs.paper import read_ranks, scaled_config

    table = run_paper(
        scaled_config(scale, parse_overrides(set_ or ())),
        scale=scale,
        ranks=read_ranks(ranks),
        best=best,
        console=console_for(json_output),
        command_line=sys.argv,
        run_dir=run_dir,
    )
    print_json(table.as_json(), json_output)


@app.command()
def audit(
    config_file: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="A TOML file, or a shipped one, such as hospitals-dp.toml; with --membership the "
            "folder of a finished run.",
        ),
    ],
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    canaries: Annotated[
        int,
        typer.Option(
            "--canaries",
            min=0,
            help="Made-up patients of each attacked run; 0: 600 on the tiny backbone, else 120.",
        ),
    ] = 0,
    membership: Annotated[
        bool,
        typer.Option("--membership", help="Tell a finished run's patients from others."),
    ] = False,
    references: Annotated[
        list[Path] | None,
        typer.Option("--reference", help="With --membership: a run on other patients."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure what the privacy code does against what it claims; needs no patient data.

    The mechanism, and the whole path of a hospital's training under watch: draws, clipping, noise,
    ledger, what releases disclose. With --membership a finished run is attacked instead.
    """
    console = console_for(json_output)
    if membership:
        if set_ or run_dir or canaries:
            raise UserError(
                "--set, --run-dir and --canaries change nothing of a finished run",
                allowed="--reference and --json beside --membership",
                fix="leave them out",
            )
        from sim.checks.audit_membership import audit_membership
        from sim.process.open_run import open_run

        run = open_run(config_file)
        found = audit_membership(run, console=console, references=references or ())
        print_json(found.as_json(), json_output)
        return
    if references:
        raise UserError("--reference without --membership", fix="add --membership, and name a run")
    config = read_config(find_config(config_file), set_ or ())
    from sim.checks.audit import audit as run_audit

    summary = run_audit(
        config, console=console, command_line=sys.argv, run_dir=run_dir, canaries=canaries
    )
    print_json(summary.as_json(), json_output)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Its run directory.")],
    set_: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Go on with an interrupted or killed run, to the same end."""
    with quick_imports():
        from sim.runs.resume import resume as resume_run

    found = resume_run(run, set_ or (), console=console_for(json_output), command_line=sys.argv)
    print_json(found, json_output)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where the comparison, bundle or checklist goes."),
    ] = None,
    bundle: Annotated[
        bool,
        typer.Option("--bundle", help="Configuration, environment and figures as an RO-Crate."),
    ] = False,
    tripod_llm: Annotated[
        bool, typer.Option("--tripod-llm", help="The reporting checklist, as far as a run knows.")
    ] = False,
) -> None:
    """Write the report page of a run, or one page that compares several."""
    from common.rundir import RunDirectory
    from sim.report.comparison import write_comparison
    from sim.report.run_report import write_report
    from sim.runs.paper import renew_table
    from sim.runs.paper_table import rank_runs

    named = [RunDirectory.open(path) for path in runs]
    if bundle or tripod_llm:
        _write_for_a_paper(named, out, bundle=bundle, tripod_llm=tripod_llm)
        return
    # A paper run has its own table; what can be compared are the runs inside.
    opened = [one for run in named for one in rank_runs(run)]
    if len(named) > 1:
        page = write_comparison(opened, out or Path("fedrx-comparison"))
    else:
        page = write_report(named[0]) if opened == named else renew_table(named[0])
    console_for(False).say(f"report: {page.absolute()}")


def _write_for_a_paper(
    runs: "list[RunDirectory]", out: Path | None, *, bundle: bool, tripod_llm: bool
) -> None:
    from sim.report.bundle import write_bundle
    from sim.report.tripod import write_checklist

    if len(runs) != 1:
        raise UserError(
            "--bundle and --tripod-llm are of one run", fix="name one run, or run it once for each"
        )
    if bundle and tripod_llm and out:
        raise UserError(
            "--out names one place, and --bundle and --tripod-llm need two", fix="run it twice"
        )
    if bundle:
        console_for(False).say(f"bundle: {write_bundle(runs[0], out)}")
    if tripod_llm:
        console_for(False).say(f"checklist: {write_checklist(runs[0], out)}")


@app.command()
def doctor(
    hospital: Annotated[
        Path | None, typer.Option("--hospital", help="A deployed hospital's folder: check it too.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Check this machine and environment, with the fix for what is missing."""
    from dataclasses import asdict

    from sim.checks.doctor import examine

    findings, colours = examine(hospital), {"ok": "green", "note": "yellow", "bad": "red"}
    table = Table("check", "", Column("found", overflow="fold"))
    for one in findings:
        table.add_row(one.check, Text(one.state, style=colours[one.state]), Text(one.found))
    # What is to be typed stands whole, where no column breaks it.
    fixes = [f"fix for {one.check}: {one.fix}" for one in findings if one.fix]
    console_for(json_output).say(table, *fixes)
    print_json([asdict(finding) for finding in findings], json_output)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


app.add_typer(cli_data.app, name="data")
for verb in (
    *(cli_runs.plan, cli_runs.evaluate, cli_runs.sweep, cli_runs.export),
    *(cli_people.judge, cli_people.suggest, cli_people.assist),
    *(cli_worth.generalise, cli_worth.contribution, cli_worth.forget),
    *(cli_deploy.deploy, cli_deploy.superlink, cli_deploy.hospital, cli_deploy.worker),
):
    app.command()(verb)
app.add_typer(cli_people.review_app, name="review")


def main() -> None:
    """Run the command line; user errors are one line and exit status 2, failed runs 1."""
    if isinstance(sys.stdout, TextIOWrapper):
        # A name from outside may hold what the terminal cannot show: it is shown escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(prog_name="fedrx", standalone_mode=False))
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except ClickException as error:
        print(f"fedrx: {usage_line(error)}", file=sys.stderr)
        sys.exit(2)
    except FedrxError as error:
        print(f"fedrx: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("fedrx: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename is not None:
            line, status = f"{error.filename}: {error.strerror}; fix: name another path", 2
        else:
            from sim.process.failures import described

            line, status = described(error, None), 1
        print(f"fedrx: {line}", file=sys.stderr)
        sys.exit(status)


def usage_line(error: ClickException) -> str:
    """Return what is wrong with a command line, and whose help says what is right.

    >>> usage_line(ClickException("Missing argument 'CONFIG'."))
    "Missing argument 'CONFIG'; fix: fedrx --help"
    """
    context = getattr(error, "ctx", None)
    verb = context.command_path if context else "fedrx"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message}; fix: {verb} --help"


if __name__ == "__main__":
    main()
