"""``fedrx data``: from tables to samples, counts and synthetic tables."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from common.config import Config
from common.configio import from_flat, parse_overrides
from common.errors import UserError
from sim.cli.options import JsonOption, SetOption, console_for, print_json

app = typer.Typer(no_args_is_help=True, help="MIMIC-IV, MEDS, eICU or synthetic data to samples.")

DirArgument = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Folder of MIMIC-IV (it holds hosp/), of a MEDS data set or of eICU, or `synthetic`.",
    ),
]


def _config(directory: str, overrides: list[str] | None) -> Config:
    config = from_flat(parse_overrides(overrides or ()))
    return replace(config, data=replace(config.data, path=directory))


@app.command()
def prepare(
    directory: DirArgument, set_: SetOption = None, json_output: JsonOption = False
) -> None:
    """Clean the tables into a cached sample table, one row per admission."""
    from sim.report.data_description import count_blocks
    from sim.report.data_description import prepare as prepare_tables
    from sim.report.terminal import block_parts

    console = console_for(json_output)
    counts = prepare_tables(_config(directory, set_), progress=console.say)
    console.say(*block_parts(*count_blocks(counts)))
    print_json(counts.as_json(), json_output)


@app.command()
def describe(
    directory: DirArgument,
    set_: SetOption = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the page and its PNG files.")
    ] = Path("fedrx-describe"),
    json_output: JsonOption = False,
) -> None:
    """Count rows, drugs, hospitals, skew and lengths; write a page with plots."""
    from sim.report.data_description import describe as describe_tables
    from sim.report.data_description import description_blocks
    from sim.report.data_page import write_page
    from sim.report.terminal import block_parts

    console = console_for(json_output)
    description = describe_tables(_config(directory, set_), progress=console.say)
    console.say(*block_parts(*description_blocks(description)))
    console.say(f"page: {write_page(description, out).absolute()}")
    print_json(description.as_json(), json_output)


@app.command()
def synthesize(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New folder to write.")],
    patients: Annotated[int, typer.Option(min=10, help="Number of patients.")] = 240,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Write synthetic MIMIC-IV tables with planted defects, and a manifest of their hashes."""
    from common.data.synthetic.write import write_tables

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"{directory} exists and is not empty",
            allowed="a new or an empty folder",
            fix="name another folder",
        )
    console = console_for(json_output)
    manifest = write_tables(directory, patients=patients, seed=seed)
    console.say(f"SYNTHETIC tables of {patients} patients in {directory.absolute()}")
    print_json(manifest.as_json(), json_output)
