"""The verbs of real deployments: ``deploy``, ``superlink``, ``hospital`` and ``worker``."""

from pathlib import Path
from typing import Annotated

import typer

from common.configio import read_config
from common.errors import UserError
from sim.cli.options import ConfigArgument, SetOption, console_for, find_config

HospitalOption = Annotated[
    list[str], typer.Option("--hospital", help="NAME=DATA: a hospital and its tables' folder.")
]


def deploy(
    config_file: ConfigArgument,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for everything.")],
    hospital: HospitalOption,
    host: Annotated[
        str, typer.Option("--host", help="Name or address by which hospitals reach you.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 9092,
    set_: SetOption = None,
) -> None:
    """Write keys, certificates and commands for a SuperLink and one SuperNode per hospital."""
    from sim.flower.deploy import deploy as write_deployment

    for text in hospital:
        name, _, data = text.partition("=")
        if not name or not data:
            raise UserError(
                f"--hospital {text}",
                allowed="NAME=DATA",
                fix=f"--hospital {name or 'NAME'}=/path/to/its/tables",
            )
    hospitals = dict(text.partition("=")[::2] for text in hospital)
    if len(hospitals) < len(hospital):
        raise UserError("two hospitals have one name", fix="name each --hospital differently")
    config = read_config(find_config(config_file), set_ or ())
    readme = write_deployment(config, out, hospitals=hospitals, host=host, port=port)
    console_for(False).say(f"what to do next: {readme}")


def superlink(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="`superlink` of a deployment.")],
) -> None:
    """Run the coordinator's SuperLink: hospitals reach Fleet, Control needs the token."""
    from sim.flower.run_superlink import run_superlink

    run_superlink(folder)


def hospital(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The hospital's own.")],
) -> None:
    """Take part in federations as one hospital, under its own policy.toml."""
    from sim.flower.run_hospital import run_hospital

    run_hospital(folder, console_for(False).say)


def worker(
    socket: Annotated[Path, typer.Option("--socket", help="The unix socket to listen on.")],
) -> None:
    """Keep a hospital's backbone in memory, and answer its SuperNode's messages."""
    from client.resident_worker import listening, serve

    with listening(socket.absolute()) as server:
        console_for(False).say("the resident worker listens")
        serve(server)
