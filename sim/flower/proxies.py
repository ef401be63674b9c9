"""nginx at both ends of a deployment: the configurations that ``fedrx deploy`` writes.

Flower serves what hospitals need (Fleet) and what commands everybody (Control) on one port, and its
SuperNode cannot present a client certificate. So the SuperLink listens on loopback; the
coordinator's nginx passes Fleet's paths alone, to holders of a certificate of the deployment's
authority; and a hospital's nginx presents that certificate for its SuperNode.
"""

import os
import shutil
from pathlib import Path

from common.errors import UserError
from sim.flower.child_environment import LOOPBACK
from sim.pages.fill import fill

CONFIGURATION, RUNTIME = "nginx.conf", "nginx"
"""File, and the folder beside it for nginx's own files."""
TEMPLATE = "deployment/nginx.conf.jinja"
FLEET = (
    *("activate-node", "deactivate-node", "send-node-heartbeat"),
    *("pull-messages", "push-messages", "get-run", "get-fab"),
    *("push-object", "pull-object", "confirm-message-received"),
)
"""What a registered SuperNode asks for; registration is none of it."""
INSIDE_NAME = "superlink.fedrx.internal"
"""Name in the SuperLink's certificate that a hospital's nginx checks, whatever the host is."""


def coordinator_proxy(*, host: str, port: int, inside_port: int) -> str:
    """Return the coordinator's nginx configuration.

    Args:
        host: By which hospitals reach it; on loopback nobody else is served.
        port: Its public port.
        inside_port: The SuperLink's, on loopback.
    """
    return fill(
        TEMPLATE,
        inside_name=INSIDE_NAME,
        listen=f"127.0.0.1:{port}" if host in LOOPBACK else str(port),
        onward=f"127.0.0.1:{inside_port}",
        fleet=FLEET,
    )


def hospital_proxy(*, host: str, port: int, tunnel_port: int) -> str:
    """Return a hospital's nginx configuration: from its loopback to the coordinator's.

    Args:
        host: The coordinator.
        port: Its public port.
        tunnel_port: Where the SuperNode finds it, on loopback.
    """
    address = f"[{host}]" if ":" in host else host
    return fill(
        TEMPLATE,
        inside_name=INSIDE_NAME,
        listen=f"127.0.0.1:{tunnel_port}",
        onward=f"{address}:{port}",
        fleet=(),
    )


def nginx_command(folder: Path) -> list[str]:
    """Return the command that runs nginx in the foreground with a folder's configuration.

    Raises:
        UserError: if there is no nginx.
    """
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    nginx = shutil.which("nginx", path=places)
    if nginx is None:
        raise UserError("nginx is not installed", fix="Debian: apt-get install nginx-light")
    runtime = folder / RUNTIME
    runtime.mkdir(mode=0o700, exist_ok=True)
    arguments = ["-p", str(runtime), "-c", str(folder / CONFIGURATION), "-e", "stderr"]
    return [nginx, *arguments, "-g", "daemon off;"]
