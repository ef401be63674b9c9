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

CONFIGURATION, RUNTIME = "nginx.conf", "nginx"
"""File, and the folder beside it for nginx's own files."""
ACCESS_LOG = "access.log"
FLEET = (
    *("activate-node", "deactivate-node", "send-node-heartbeat"),
    *("pull-messages", "push-messages", "get-run", "get-fab"),
    *("push-object", "pull-object", "confirm-message-received"),
)
"""What a registered SuperNode asks for; registration is none of it."""
INSIDE_NAME = "superlink.fedrx.internal"
"""Name in the SuperLink's certificate that a hospital's nginx checks, whatever the host is."""
LARGEST_MESSAGE = "2g"

_HEAD = """\
# written by fedrx deploy
worker_processes 1;
pid nginx.pid;
error_log error.log info;
events {{ worker_connections 512; }}
http {{
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    log_format told '$time_iso8601 $remote_addr "$ssl_client_s_dn" $ssl_client_verify '
                    '$request_method $uri $status';
    access_log {access};
    ssl_protocols TLSv1.3;
    ssl_session_tickets off;
    server_tokens off;
    client_max_body_size {largest};
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_read_timeout 300s;
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate ca.pem;
    proxy_ssl_protocols TLSv1.3;
    proxy_ssl_name {name};
"""


def coordinator_proxy(*, host: str, port: int, inside_port: int) -> str:
    """Return the coordinator's nginx configuration.

    Args:
        host: By which hospitals reach it; on loopback nobody else is served.
        port: Its public port.
        inside_port: The SuperLink's, on loopback.
    """
    listen = f"127.0.0.1:{port}" if host in LOOPBACK else str(port)
    head = _HEAD.format(access=f"{ACCESS_LOG} told", largest=LARGEST_MESSAGE, name=INSIDE_NAME)
    return f"""{head}
    server {{
        listen {listen} ssl;
        ssl_certificate server.pem;
        ssl_certificate_key server.key;
        ssl_client_certificate ca.pem;
        ssl_verify_client on;
        ssl_verify_depth 1;
        # Fleet alone: run, register, stop, log, and the tasks of apps are not to be had here.
        location ~ ^/v1/fleet/({"|".join(FLEET)})$ {{
            proxy_pass https://127.0.0.1:{inside_port};
        }}
        location / {{ return 403; }}
    }}
}}
"""


def hospital_proxy(*, host: str, port: int, tunnel_port: int) -> str:
    """Return a hospital's nginx configuration: from its loopback to the coordinator's.

    Args:
        host: The coordinator.
        port: Its public port.
        tunnel_port: Where the SuperNode finds it, on loopback.
    """
    address = f"[{host}]" if ":" in host else host
    head = _HEAD.format(access="off", largest=LARGEST_MESSAGE, name=INSIDE_NAME)
    return f"""{head}
    proxy_ssl_certificate node.pem;
    proxy_ssl_certificate_key node-tls.key;
    server {{
        listen 127.0.0.1:{tunnel_port} ssl;
        ssl_certificate local.pem;
        ssl_certificate_key local.key;
        location / {{ proxy_pass https://{address}:{port}; }}
    }}
}}
"""


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
