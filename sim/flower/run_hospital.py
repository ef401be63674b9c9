"""``fedrx hospital``: one hospital's side of a deployment.

Four processes: nginx towards the coordinator, Flower's SuperNode, the resident worker with the
backbone, and this one, which takes the SuperNode's tasks, holds each bundle to the installation,
and hands the message to the worker. No code that comes over the network is installed or imported.
"""

import functools
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flwr.app import Context, Message

from client.bundle import check_bundle, check_installation
from client.policy import describe, read_policy
from client.resident_worker import ask, listens
from client.site import SOCKET, Site, read_site
from client.tasks import answer_tasks
from common.configio import toml_scalar
from common.errors import RunFailed, UserError
from common.files import locked, write_bytes
from sim.flower.child_environment import ask_loopback_directly
from sim.flower.children import Children
from sim.flower.proxies import nginx_command
from sim.flower.run_superlink import LOCK, flower_quiet
from sim.flower.superlink import START_SECONDS, script

SECRET = "runtime.secret"


def run_hospital(folder: Path, say: Callable[[str], None]) -> None:
    """Take part in federations until one of the processes ends.

    Args:
        folder: The hospital's own, as ``fedrx deploy`` wrote it.
        say: Tells a person what the policy means.

    Raises:
        UserError: for a broken ``site.toml`` or ``policy.toml``, no nginx, or where another process
            takes part from this folder.
        ForeignCode: if the policy names other code than is installed.
        RunFailed: when one of the processes ends.
    """
    ask_loopback_directly()
    folder = folder.absolute()
    site, policy = read_site(folder), read_policy(folder)
    digest = check_installation(policy)
    proxy = nginx_command(folder)
    say(f"hospital {site.hospital}; code {digest}")
    say(f"policy: {describe(policy)}")
    secret = secrets.token_bytes(32)
    busy = UserError(f"a process takes part as {site.hospital} already", fix="end it first")
    with (
        locked(folder / LOCK, refusal=busy),
        Children(folder / "empty", flower_quiet(folder)) as children,
    ):
        write_bytes(folder / SECRET, secret)
        signal.signal(signal.SIGTERM, _end)
        children.start("nginx", proxy)
        worker = [script("fedrx"), "worker", "--socket", str(folder / SOCKET)]
        children.start("the resident worker", worker)
        _wait_for(folder / SOCKET, children.check)
        children.start("the SuperNode", _supernode(folder, site))
        respond = functools.partial(_respond, folder / SOCKET)
        answer_tasks(f"127.0.0.1:{site.node_port}", secret, respond, check=children.check)


def _respond(worker: Path, message: Message, context: Context, bundle: bytes) -> Message:
    source = check_bundle(bundle)
    return ask(worker, message.metadata.message_type, message, context, source=source)


def _supernode(folder: Path, site: Site) -> list[str]:
    config = " ".join(
        f"{key}={toml_scalar(value)}" for key, value in site.node_config(folder).items()
    )
    worker = f"worker={toml_scalar(str(folder / SOCKET))}"
    return [
        *(script("flower-supernode"), "--superlink", f"127.0.0.1:{site.tunnel_port}"),
        *("--root-certificates", str(folder / "local-ca.pem")),
        *("--auth-supernode-private-key", str(folder / "node.key")),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder / SECRET)),
        *("--host", "127.0.0.1", "--port", str(site.node_port)),
        *("--node-config", f"{config} {worker}"),
    ]


def _wait_for(socket: Path, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not listens(socket):
        check()
        if time.monotonic() > deadline:
            raise RunFailed("the resident worker did not start")
        time.sleep(0.2)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)
