"""A hospital's name is bound to its key: who signs a handshake is who it says it is.

The server sends a fresh number; the hospital signs it with its node key, together with Flower's
number of its node and all that it tells. So neither an old handshake, nor one that another node
relays, nor one with another hospital's name passes. ``fedrx deploy`` makes the keys.
"""

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from common.errors import RunFailed, UserError

NODE_KEY = "node.key"
"""A hospital's private key, in its own folder (OpenSSH)."""
NONCE, SIGNATURE = "nonce", "signature"
"""Scalars of the handshake: to the hospital, and back."""
NONCE_PATTERN = re.compile(r"[0-9a-f]{32}")
SIGNATURE_PATTERN = "[0-9a-f]{16,256}"
_ALGORITHM = ec.ECDSA(hashes.SHA384())


class Impostor(RunFailed):
    """A node that is not the hospital whose name it gives."""


def new_nonce() -> str:
    """Return a number that was never used before."""
    return secrets.token_hex(16)


def sign(folder: Path, nonce: str, node: int, facts: Mapping[str, object]) -> str:
    """Sign a handshake with the key in a hospital's folder; hexadecimal.

    Raises:
        RunFailed: if the folder holds no such key.
    """
    try:
        key = load_ssh_private_key((folder / NODE_KEY).read_bytes(), password=None)
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunFailed(
            f"the server asks for a signature, and this hospital has no {NODE_KEY}; fix: use the "
            "folder that `fedrx deploy` wrote for it"
        )
    return key.sign(_statement(nonce, node, facts), _ALGORITHM).hex()


def read_keys(folder: Path) -> dict[str, ec.EllipticCurvePublicKey]:
    """Return hospital -> public key from a folder of ``NAME.pub`` files.

    Raises:
        UserError: if there is none, or one that is no key of ``fedrx deploy``.
    """
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    for file in sorted(folder.glob("*.pub")):
        try:
            key = load_ssh_public_key(file.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise UserError(f"{file} is no hospital's key", fix="take the one of `fedrx deploy`")
        keys[file.stem] = key
    if not keys:
        raise UserError(
            f"run.hospital-keys={folder}: no NAME.pub there",
            fix="name the folder `superlink/nodes` of `fedrx deploy`",
        )
    return keys


def check_signature(
    keys: Mapping[str, ec.EllipticCurvePublicKey],
    nonce: str,
    node: int,
    handshake: Mapping[str, object],
) -> None:
    """Hold a handshake to the key of the hospital that it names.

    Raises:
        Impostor: if the name is nobody's, or the signature is not by that hospital's key.
    """
    facts = {name: value for name, value in handshake.items() if name != SIGNATURE}
    name = str(handshake["hospital"])
    if name not in keys:
        raise Impostor(f"it calls itself {name}, which is no hospital of this deployment")
    try:
        signature = bytes.fromhex(str(handshake[SIGNATURE]))
        keys[name].verify(signature, _statement(nonce, node, facts), _ALGORITHM)
    except (InvalidSignature, ValueError):
        raise Impostor(f"it calls itself {name}, and has not signed with {name}'s key") from None


def _statement(nonce: str, node: int, facts: Mapping[str, object]) -> bytes:
    signed = {"nonce": nonce, "node": node, "facts": dict(facts)}
    return b"fedrx handshake " + json.dumps(signed, sort_keys=True).encode()
