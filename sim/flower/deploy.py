"""``fedrx deploy``: keys, certificates and the exact commands for real hospitals.

The same two apps, unchanged: a SuperLink with TLS and node authentication at the coordinator,
one SuperNode with a resident worker per hospital, each with its own data folder. Only the folder
of a hospital is given to it; the certificate authority's key stays with the coordinator.
"""

import datetime
import importlib.metadata
import ipaddress
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.config import Config
from common.configio import flatten, toml_scalar
from common.errors import UserError
from common.files import write_text
from common.wire.cohort import check_strategy
from common.wire.handshake import NAME_PATTERN
from sim.flower.bundle import stage_app
from sim.flower.superlink import CONNECTION

VALID_DAYS = 825
FIRST_NODE_PORT = 9094
QUIET = """\
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 HF_HUB_DISABLE_TELEMETRY=1
"""
WATCH = """\
trap 'kill "$worker" "$node" 2>/dev/null || true' EXIT
trap 'exit 143' INT TERM
while kill -0 "$node" 2>/dev/null; do
  if ! kill -0 "$worker" 2>/dev/null; then
    echo "the resident worker ended: the SuperNode ends too; start both again" >&2
    exit 1
  fi
  sleep 1
done
wait "$node"
"""
"""A SuperNode without its worker could only fail."""


def deploy(
    config: Config, folder: Path, *, hospitals: Mapping[str, str], host: str, port: int
) -> Path:
    """Write everything that a deployment needs.

    Args:
        config: Complete configuration; ``federation.hospitals`` becomes their number.
        folder: New or empty folder.
        hospitals: Name -> folder of its MIMIC-IV tables, as seen on the hospital's machine.
        host: Name or IP address by which hospitals reach the SuperLink.
        port: Its port.

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
    folder = folder.absolute()
    link = folder / "superlink"
    link.mkdir(parents=True)
    config = replace(
        config,
        federation=replace(config.federation, hospitals=len(hospitals)),
        run=replace(config.run, directory=str(folder / "run")),
    )
    authority = _write_certificates(folder, host)
    _write_superlink(link, config, authority, host, port, list(hospitals))
    for number, (name, data) in enumerate(hospitals.items()):
        own = folder / "hospitals" / name
        _write_hospital(own, name, data, authority, f"{host}:{port}", FIRST_NODE_PORT + number)
        write_text(link / "nodes" / f"{name}.pub", (own / "node.pub").read_text())
    readme = folder / "README.md"
    write_text(readme, _instructions(list(hospitals)))
    return readme


def _write_certificates(folder: Path, host: str) -> str:
    """Write the authority's and the SuperLink's certificates; return the authority's (PEM)."""
    authority_key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedRx deployment authority")])
    authority = (
        _certificate(name, authority_key.public_key(), name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA384())
    )
    key = ec.generate_private_key(ec.SECP384R1())
    names: set[str] = {host, "localhost", "127.0.0.1"}
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    leaf = (
        _certificate(subject, key.public_key(), name)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName([_general_name(one) for one in sorted(names)]),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )
    pem = authority.public_bytes(serialization.Encoding.PEM).decode()
    _write_secret(folder / "authority" / "ca.key", _private_pem(authority_key))
    write_text(folder / "authority" / "ca.pem", pem)
    _write_secret(folder / "superlink" / "server.key", _private_pem(key))
    write_text(
        folder / "superlink" / "server.pem",
        leaf.public_bytes(serialization.Encoding.PEM).decode() + pem,
    )
    return pem


def _certificate(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _general_name(name: str) -> x509.GeneralName:
    if re.fullmatch(r"[\d.]+|[\da-fA-F:]*:[\da-fA-F:]*", name):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _write_superlink(
    link: Path, config: Config, authority: str, host: str, port: int, hospitals: list[str]
) -> None:
    write_text(link / "ca.pem", authority)
    stage_app(link, version=importlib.metadata.version("fedrx"))
    write_text(
        link / "run-config.toml",
        "".join(f"{key} = {toml_scalar(value)}\n" for key, value in flatten(config).items()),
    )
    write_text(
        link / "home" / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {toml_scalar(f'{host}:{port}')}\n"
        f"root-certificates = {toml_scalar(str(link / 'ca.pem'))}\n",
    )
    (link / "empty").mkdir()
    head = f'{QUIET}cd "$(dirname "$0")/empty"\nexport FLWR_HOME="$PWD/../home"\n'
    _write_script(
        link / "start.sh",
        f"{head}exec flower-superlink --enable-supernode-auth --isolation subprocess "
        f"--host 0.0.0.0 --port {port} \\\n  --ssl-certfile ../server.pem "
        "--ssl-keyfile ../server.key --ssl-ca-certfile ../ca.pem\n",
    )
    register = "".join(
        f"flwr supernode register ../nodes/{name}.pub {CONNECTION} --name {name}\n"
        for name in hospitals
    )
    _write_script(link / "register.sh", head + register)
    _write_script(
        link / "run.sh",
        f"{head}exec flwr run ../fedrx {CONNECTION} --run-config ../run-config.toml --stream\n",
    )


def _write_hospital(
    own: Path, name: str, data: str, authority: str, superlink: str, port: int
) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write_secret(own / "node.key", openssh.decode())
    write_text(own / "node.pub", public.decode() + "\n")
    write_text(own / "ca.pem", authority)
    for sub in ("empty", "home"):
        (own / sub).mkdir()
    quoted = shlex.quote(data)
    _write_script(
        own / "start.sh",
        f"umask 077\n{QUIET}"
        'cd "$(dirname "$0")/empty"\n'
        'own="$(cd .. && pwd)"\n'
        'export FLWR_HOME="$own/home"\n'
        f"data={quoted}\n"
        "# What all runs together may spend on each patient here; empty: no limit.\n"
        "max_epsilon=\n"
        'fedrx worker --socket "$own/worker.sock" &\n'
        "worker=$!\n"
        "flower-supernode --isolation subprocess \\\n"
        f'  --superlink {superlink} --root-certificates "$own/ca.pem" \\\n'
        f'  --auth-supernode-private-key "$own/node.key" --port {port} \\\n'
        f'  --node-config "hospital=\\"{name}\\" data=\\"$data\\" folder=\\"$own\\" '
        'worker=\\"$own/worker.sock\\" ${max_epsilon:+max-epsilon=$max_epsilon}" &\n'
        "node=$!\n"
        f"{WATCH}",
    )


def _instructions(hospitals: list[str]) -> str:
    steps = "\n".join(f"   - {name}: `hospitals/{name}/start.sh`" for name in hospitals)
    return f"""# A FedRx deployment

Research only, not for clinical use.

1. Coordinator: `superlink/start.sh` (TLS, node authentication). Keep `authority/ca.key` offline.
2. Coordinator, once: `superlink/register.sh` registers the hospitals' public keys. A node whose
   key is not registered is refused.
3. Give each hospital its own folder and nothing else; it needs the same FedRx version, and
   starts a resident worker and a SuperNode:
{steps}
4. Coordinator: `superlink/run.sh` starts the federation; the run directory is `run/`.

## Going on after an interruption

`superlink/run.sh` again goes on in `run/` from its last checkpoint, if `superlink/run-config.toml`
is as it was (another one is refused); a run that has finished stays as it is. Two runs at once in
one `run/` spoil it: end the old one first. A SuperLink that was started again has forgotten the
keys: run `superlink/register.sh` before. A hospital that was away starts its `start.sh` again, and
goes on with what its folder holds.

## What is in a hospital's folder

A hospital's folder holds its private key (`node.key`), and later its optimizer state, logs and
error texts (`runs/`). Its tables, and everything in that folder, stay there: only B travels.

A hospital need not trust the coordinator's configuration for its patients' privacy: with
`max_epsilon` set in its `start.sh` it takes part only in runs that protect every patient, and only
until the epsilons of all of them, added up, reach that figure (`privacy-promise.json`, one for each
run below `runs/`).
"""


def _write_script(file: Path, text: str) -> None:
    write_text(file, f"#!/bin/sh\nset -eu\n{text}")
    file.chmod(0o755)


def _write_secret(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.write_text(text, encoding="utf-8")


def _private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
