"""``fedrx superlink``: the coordinator's side of a deployment, behind nginx."""

import os
import ssl
import sys
import sysconfig
import time
from pathlib import Path

import httpx

from client.policy import Typed, read_model
from client.site import Port
from common.errors import RunFailed, UserError
from common.files import locked
from sim.flower import guarded_superlink
from sim.flower.child_environment import QUIET, without_loopback_proxy
from sim.flower.children import Children
from sim.flower.proxies import nginx_command
from sim.flower.superlink import START_SECONDS, script

LINK = "superlink.toml"
SECRET = "superexec.secret"
PROBE = "/v1/control/list-runs"
UNAUTHORISED = 401
LOCK = ".lock"
"""Held by the one process that runs from a folder of a deployment."""


class Link(Typed):
    """The coordinator's settings; ``fedrx deploy`` writes them."""

    inside_port: Port
    """Loopback port of Flower's SuperLink."""

    @property
    def address(self) -> str:
        """Where Flower's command and its apps find the SuperLink."""
        return f"127.0.0.1:{self.inside_port}"


def flower_quiet(folder: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: no telemetry, no installs, a home of ours."""
    return {
        **os.environ,
        **without_loopback_proxy(os.environ),
        **QUIET,
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(folder / "home"),
    }


def run_superlink(folder: Path) -> None:
    """Run SuperLink, its executor and nginx until one of them ends.

    nginx, which makes the SuperLink reachable, starts only after the Control API has refused a
    request without a token.

    Args:
        folder: ``superlink/`` of a deployment.

    Raises:
        UserError: for a broken ``superlink.toml``, no nginx, or where another process runs from
            this folder: its executor would take the runs of the first one's SuperLink.
        RunFailed: when one of the processes ends, or Control obeys without a token.
    """
    folder = folder.absolute()
    link = read_model(folder / LINK, Link, missing="name the folder `superlink` of a deployment")
    proxy = nginx_command(folder)
    busy = UserError(f"a SuperLink runs from {folder} already", fix="end it first")
    with (
        locked(folder / LOCK, refusal=busy),
        Children(folder / "empty", flower_quiet(folder)) as children,
    ):
        children.start("the SuperLink", _superlink(folder, link))
        _wait_until_guarded(folder, link, children)
        children.start("nginx", proxy)
        children.start("the executor", _executor(folder, link))
        while True:
            children.check()
            time.sleep(0.5)


def _superlink(folder: Path, link: Link) -> list[str]:
    return [
        *(sys.executable, "-P", "-m", guarded_superlink.__name__),
        *(link.address, "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder / SECRET)),
        *("--host", "127.0.0.1", "--port", str(link.inside_port)),
        *("--ssl-certfile", str(folder / "server.pem")),
        *("--ssl-keyfile", str(folder / "server.key")),
        *("--ssl-ca-certfile", str(folder / "ca.pem")),
    ]


def _executor(folder: Path, link: Link) -> list[str]:
    return [
        *(script("flower-superexec"), "--runtime-api-address", link.address),
        *("--root-certificates", str(folder / "ca.pem")),
        *("--superexec-auth-secret-file", str(folder / SECRET), "--parent-pid", str(os.getpid())),
    ]


def _wait_until_guarded(folder: Path, link: Link, children: Children) -> None:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(verify=context, trust_env=False) as client:
        while time.monotonic() < deadline:
            children.check()
            try:
                answer = client.post(
                    f"https://{link.address}{PROBE}",
                    headers={"content-type": "application/protobuf"},
                )
            except httpx.TransportError:
                time.sleep(0.2)
                continue
            if answer.status_code != UNAUTHORISED:
                raise RunFailed(
                    f"the Control API answered {answer.status_code} to a request without a token: "
                    "nothing is opened to hospitals"
                )
            return
    raise RunFailed("the SuperLink did not start")
