"""``fedrx deploy``: keys, certificates and the exact commands for real hospitals.

The same two apps: a SuperLink behind nginx at the coordinator, one SuperNode behind nginx
with a resident worker per hospital, each with its own data folder. Only the folder of a hospital is
given to it; the certificate authority's key stays with the coordinator.
"""

import importlib.metadata
import itertools
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from client.policy import POLICY
from client.site import SITE
from common.config import Config
from common.configio import Scalar, config_digest, flatten, toml_scalar
from common.errors import UserError
from common.files import write_text
from common.privacy.settings import with_calibrated_noise
from common.provenance import source_digest
from common.wire.handshake import NAME_PATTERN
from server.strategies import check_strategy
from sim.flower.bundle import stage_app
from sim.flower.certificates import (
    Authority,
    new_authority,
    new_key,
    private_openssh,
    private_pem,
    public_openssh,
)
from sim.flower.child_environment import LOOPBACK, QUIET
from sim.flower.guarded_superlink import write_token
from sim.flower.proxies import CONFIGURATION, INSIDE_NAME, coordinator_proxy, hospital_proxy
from sim.flower.run_superlink import LINK, SECRET
from sim.flower.superlink import CONNECTION
from sim.pages.fill import fill

FIRST_LOCAL_PORT = 9093
DIRECT = f"""\
no_proxy="${{no_proxy:-${{NO_PROXY:-}}}}"
[ "$no_proxy" = "*" ] || no_proxy="${{no_proxy:+$no_proxy,}}{",".join(LOOPBACK)}"
export no_proxy NO_PROXY="$no_proxy" no_grpc_proxy="${{no_grpc_proxy:+$no_grpc_proxy,}}$no_proxy"
"""
"""What a host's own processes say to each other goes through no proxy."""
_SAID = " ".join(f"{name}={value}" for name, value in QUIET.items())
HEAD = f'export {_SAID}\n{DIRECT}cd "$(dirname "$0")/empty"\nexport FLWR_HOME="$PWD/../home"\n'
LONGEST_NAME = 64
"""Of a certificate's common name (X.520)."""


def deploy(
    config: Config,
    folder: Path,
    *,
    hospitals: Mapping[str, str],
    host: str,
    port: int,
    local_ports: Iterator[int] | None = None,
) -> Path:
    """Write everything that a deployment needs.

    Args:
        config: Complete configuration; ``federation.hospitals`` becomes their number, and the
            noise of a private run is calibrated here, once.
        folder: New or empty folder.
        hospitals: Name -> folder of its MIMIC-IV tables, as seen on the hospital's machine.
        host: Name or IP address by which hospitals reach the coordinator.
        port: Its port.
        local_ports: Loopback ports to use: one for the SuperLink, then two for each hospital.

    Returns:
        README.md in the folder: what to do, in order.

    Raises:
        UserError: for a bad name, no hospitals, a folder that is not empty, or a strategy that
            withstands nothing with so many.
    """
    bad = [name for name in hospitals if not NAME_PATTERN.fullmatch(name)]
    if bad or not hospitals:
        raise UserError(
            f"--hospital {bad[0] if bad else ''}".rstrip(),
            allowed=f"NAME=DATA with a name that matches {NAME_PATTERN.pattern}",
            fix="for instance --hospital north=/data/mimic-iv",
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty", fix="name a new folder")
    check_strategy(replace(config.federation, hospitals=len(hospitals)))
    folder, ports = folder.absolute(), local_ports or itertools.count(FIRST_LOCAL_PORT)
    link = folder / "superlink"
    run = replace(
        config.run, directory=str(folder / "run"), hospital_keys=str(folder / "superlink" / "nodes")
    )
    federation = replace(config.federation, hospitals=len(hospitals))
    config = with_calibrated_noise(replace(config, federation=federation, run=run))
    agreed = {"configuration": config_digest(config), "code": source_digest()}
    authority = new_authority()
    write_text(folder / "authority" / "ca.key", private_pem(authority.key))
    write_text(folder / "authority" / "ca.pem", authority.pem)
    _write_superlink(link, config, authority, host, port, next(ports), list(hospitals))
    for name, data in hospitals.items():
        own = folder / "hospitals" / name
        proxy = hospital_proxy(host=host, port=port, tunnel_port=(tunnel := next(ports)))
        write_text(own / CONFIGURATION, proxy)
        _write_hospital(own, name, data, authority, node_port=next(ports), tunnel_port=tunnel)
        write_text(own / POLICY, fill("deployment/policy.toml.jinja", **agreed))
        write_text(link / "nodes" / f"{name}.pub", (own / "node.pub").read_text())
    readme = folder / "README.md"
    write_text(readme, fill("deployment/README.md.jinja", hospitals=hospitals, **agreed))
    return readme


def _write_superlink(
    link: Path,
    config: Config,
    authority: Authority,
    host: str,
    port: int,
    inside_port: int,
    hospitals: list[str],
) -> None:
    key, names = new_key(), {host, INSIDE_NAME, "localhost", "127.0.0.1"}
    write_text(link / "server.key", private_pem(key))
    write_text(link / "server.pem", authority.server(key, names) + authority.pem)
    write_text(link / "ca.pem", authority.pem)
    write_text(link / SECRET, secrets.token_hex(32))
    write_text(link / LINK, _toml({"inside-port": inside_port}))
    write_text(
        link / CONFIGURATION, coordinator_proxy(host=host, port=port, inside_port=inside_port)
    )
    stage_app(link, version=importlib.metadata.version("fedrx"))
    write_text(link / "run-config.toml", _toml(flatten(config)))
    address = f"127.0.0.1:{inside_port}"
    write_text(
        link / "home" / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {toml_scalar(address)}\n"
        f"root-certificates = {toml_scalar(str(link / 'ca.pem'))}\n",
    )
    write_token(link / "home", address, secrets.token_urlsafe(32))
    (link / "empty").mkdir()
    _write_script(link / "start.sh", 'exec fedrx superlink "$(cd "$(dirname "$0")" && pwd)"\n')
    register = "".join(
        f"flwr supernode register ../nodes/{name}.pub {CONNECTION} --name {name}\n"
        for name in hospitals
    )
    _write_script(link / "register.sh", HEAD + register)
    _write_script(
        link / "run.sh",
        f"{HEAD}exec flwr run ../fedrx {CONNECTION} --run-config ../run-config.toml --stream\n",
    )


def _write_hospital(
    own: Path, name: str, data: str, authority: Authority, *, node_port: int, tunnel_port: int
) -> None:
    key = new_key()
    # The same key thrice: as Flower reads it, as nginx reads it, and its public half.
    write_text(own / "node.key", private_openssh(key))
    write_text(own / "node-tls.key", private_pem(key))
    write_text(own / "node.pub", public_openssh(key))
    write_text(own / "node.pem", authority.client(key, name[:LONGEST_NAME]))
    write_text(own / "ca.pem", authority.pem)
    # Between SuperNode and nginx, on the hospital's loopback; nobody else trusts this authority.
    local, local_key = new_authority(), new_key()
    write_text(own / "local.key", private_pem(local_key))
    write_text(own / "local.pem", local.server(local_key, {"127.0.0.1", "localhost"}))
    write_text(own / "local-ca.pem", local.pem)
    for sub in ("empty", "home"):
        (own / sub).mkdir()
    site: dict[str, Scalar] = {"hospital": name, "data": data}
    write_text(own / SITE, _toml({**site, "node-port": node_port, "tunnel-port": tunnel_port}))
    _write_script(
        own / "start.sh", 'umask 077\nexec fedrx hospital "$(cd "$(dirname "$0")" && pwd)"\n'
    )


def _toml(values: Mapping[str, Scalar]) -> str:
    return "".join(f"{key} = {toml_scalar(value)}\n" for key, value in values.items())


def _write_script(file: Path, text: str) -> None:
    write_text(file, f"#!/bin/sh\nset -eu\n{text}")
    file.chmod(0o755)
