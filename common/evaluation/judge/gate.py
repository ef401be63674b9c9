"""Where a run's data may be sent: loopback, unless the data is open or an agreement is stated.

PhysioNet forbids sharing credentialed data with third parties, services behind an API included
(https://physionet.org/news/post/gpt-responsible-use). A name is loopback only if it says so itself:
an address of 127.0.0.0/8 or ::1, or ``localhost``, which is then resolved here, must have loopback
addresses alone, and is replaced by one of them, so that no later look-up can lead elsewhere.
"""

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.data.handling import handling_of, strictest
from common.errors import UserError
from common.rundir import DATA, SUMMARY, RunDirectory

_CONNECT_SECONDS = 1.0
SHORTEST_AGREEMENT = 12
Resolver = Callable[[str, int], list[str]]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What the user stated on the command line: this host is covered by this agreement."""

    host: str
    agreement: str


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server that may be used."""

    url: str
    """What requests go to; for ``localhost`` over http with the address in the name's place."""
    named: str
    """The same as the user named it."""
    host: str
    loopback: bool
    statement: Statement | None
    """Set only where it was needed."""


def source_of_run(run: RunDirectory) -> str:
    """Return the source tag of a run, from summary.json and data.json: in doubt credentialed."""
    # As they stand: summaries of a paper run and of an audit are other records, and whatever is no
    # source that is known to be open counts as credentialed.
    documents = run.read_json(SUMMARY), run.read_json(DATA)
    return strictest([document["source"] for document in documents if "source" in document])


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, in the system's order."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def check_endpoint(
    base_url: str,
    *,
    source: str,
    statement: Statement | None = None,
    resolver: Resolver = resolve,
    key: str = "judge.base-url",
) -> Endpoint:
    """Decide whether data of ``source`` may go to ``base_url``.

    Args:
        base_url: As configured.
        source: ``synthetic``, ``demo`` or anything else, which counts as credentialed.
        statement: From the command line.
        resolver: Looks ``localhost`` up.
        key: Whose address it is.

    Raises:
        UserError: If the address is malformed, or the data may not go there.
    """
    scheme, host, port, path = _parts(base_url, key)
    _check_statement(statement, host)
    address = _literal(host)
    is_open = handling_of(source).is_open
    loopback = _is_loopback(address) if address else host == "localhost"
    if not loopback and not is_open:
        _demand(statement, host, scheme)
    target = f"[{address}]" if address and ":" in address else address or host
    if host == "localhost":
        addresses = _localhost(resolver, port, key)
        # Over https the certificate is for the name, and guards it by itself.
        if scheme == "http":
            pinned = _answering(addresses, port)
            target = f"[{pinned}]" if ":" in pinned else pinned
    return Endpoint(
        url=f"{scheme}://{target}:{port}{path}",
        named=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{path}",
        host=host,
        loopback=loopback,
        statement=None if loopback or is_open else statement,
    )


def _parts(base_url: str, key: str) -> tuple[str, str, int, str]:
    """Take the address apart, refusing everything that two parsers could read differently."""
    complaint = UserError(
        f"{key} is not a plain http(s) address",
        allowed="http://HOST:PORT/PATH without user, query or fragment",
        fix=f"for instance {key}=http://127.0.0.1:8000/v1",
    )
    odd = any(not "!" <= character <= "~" or character in '\\"<>^`{|}%' for character in base_url)
    try:
        url = urlsplit(base_url)
        port = url.port
    except ValueError:
        raise complaint from None
    if odd or url.scheme not in ("http", "https") or not url.hostname:
        raise complaint
    if "@" in url.netloc or url.query or url.fragment or "?" in base_url or "#" in base_url:
        raise complaint
    literal = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    if url.netloc.lower() not in (literal, f"{literal}:{port}"):
        raise complaint
    host = url.hostname.lower().rstrip(".")
    if port == 0 or not host:
        raise complaint
    return url.scheme, host, port or (443 if url.scheme == "https" else 80), url.path.rstrip("/")


def _literal(host: str) -> str | None:
    """Return the canonical address if ``host`` is one, written in full."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(address)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _localhost(resolver: Resolver, port: int, key: str) -> list[str]:
    try:
        addresses = resolver("localhost", port)
    except OSError:
        addresses = []
    if not addresses or not all(_is_loopback(address) for address in addresses):
        raise UserError(
            f"{key}: localhost does not resolve to loopback on this machine",
            fix="use 127.0.0.1 in its place",
        )
    return addresses


def _answering(addresses: list[str], port: int) -> str:
    """Return the first address where something listens, else the first."""
    for address in addresses if len(addresses) > 1 else []:
        try:
            socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
        except OSError:
            continue
        return address
    return addresses[0]


def _check_statement(statement: Statement | None, host: str) -> None:
    if statement is None:
        return
    if statement.host.strip().lower().rstrip(".") != host:
        raise UserError(
            f"--agreement-host {statement.host}: judge.base-url names host {host}",
            allowed="the host of judge.base-url",
            fix="name the host that the agreement covers, in both places",
        )
    if len(statement.agreement.strip()) < SHORTEST_AGREEMENT:
        raise UserError(
            "--agreement is too short to name an agreement",
            allowed=f"at least {SHORTEST_AGREEMENT} characters",
            fix="name the contract or data-use agreement and its date",
        )


def _demand(statement: Statement | None, host: str, scheme: str) -> None:
    if statement is None:
        raise UserError(
            f"judge.base-url={host} is not loopback, and the run's data counts as credentialed "
            "(PhysioNet: no sharing with third parties, APIs included)",
            allowed="127.0.0.0/8, ::1 or localhost; or a host with a stated agreement",
            fix="use a local judge, or state both --agreement-host HOST and --agreement TEXT",
        )
    if scheme != "https":
        raise UserError(
            f"judge.base-url={host} would get credentialed data over plain http",
            allowed="https",
            fix="use the https address of the server",
        )
