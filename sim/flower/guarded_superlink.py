"""Flower's SuperLink, whose Control API asks for the coordinator's token.

Flower's own account authentication takes plug-ins (``ControlAuthnPlugin``), but its loader finds
none outside the enterprise edition. This module puts one in and starts Flower's own command with
the arguments that it was given: ``python -m sim.flower.guarded_superlink ADDRESS --port ...``.
"""

import hmac
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import RunFailed
from common.wire.undocumented_deployment import (
    ACCESS_TOKEN_KEY,
    ACCESS_TOKEN_STORE_KEY,
    AUTHN_TYPE_STORE_KEY,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    REFRESH_TOKEN_STORE_KEY,
    SUPERLINK_COMMAND,
    AccountAuthCredentials,
    AccountAuthLoginDetails,
    AccountInfo,
    AuthnType,
    ControlAuthnPlugin,
    FileCredentialStore,
)

CREDENTIALS = "credentials.yaml"
"""Flower's own file of tokens, in FLWR_HOME: its ``flwr`` command sends what is in there."""
_LOADER = "load_control_authn_plugin"
Metadata = Sequence[tuple[str, str | bytes]]


class TokenAccount(ControlAuthnPlugin):
    """Lets in who has the token, and nobody else.

    Args:
        token: The coordinator's.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        """Return None: nobody logs in over the network."""
        return None

    def validate_tokens_in_metadata(self, metadata: Metadata) -> tuple[bool, AccountInfo | None]:
        """Return whether a request's token is the coordinator's, and Flower's one account."""
        given = dict(metadata).get(ACCESS_TOKEN_KEY, "")
        given = given.encode() if isinstance(given, str) else given
        if not hmac.compare_digest(given, self._token):
            return False, None
        return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        """Return None: no token is given out."""
        return None

    def refresh_tokens(self, metadata: Metadata) -> tuple[Metadata | None, AccountInfo | None]:
        """Return None: no token is given out."""
        return None, None


def write_token(home: Path, address: str, token: str) -> None:
    """Put a token where Flower's command looks for it (mode 0600).

    Args:
        home: FLWR_HOME.
        address: Of the Control API.
        token: What is sent to it.
    """
    store = FileCredentialStore(home / CREDENTIALS)
    store.set(AUTHN_TYPE_STORE_KEY % address, AuthnType.OIDC.encode())
    store.set(ACCESS_TOKEN_STORE_KEY % address, token.encode())
    store.set(REFRESH_TOKEN_STORE_KEY % address, b"none")


def read_token(home: Path, address: str) -> str:
    """Return what ``write_token`` wrote.

    Raises:
        RunFailed: if there is none: a SuperLink without a token would obey everybody.
    """
    token = FileCredentialStore(home / CREDENTIALS).get(ACCESS_TOKEN_STORE_KEY % address)
    if not token:
        raise RunFailed(f"{home / CREDENTIALS} holds no token for {address}")
    return token.decode()


def main() -> None:
    """Start the SuperLink."""
    address = sys.argv.pop(1)
    account = TokenAccount(read_token(Path(os.environ["FLWR_HOME"]), address))
    command = importlib.import_module(SUPERLINK_COMMAND)
    if not hasattr(command, _LOADER):
        raise RunFailed("this version of Flower has no account authentication to fill in")
    setattr(command, _LOADER, lambda: account)
    command.flower_superlink()


if __name__ == "__main__":
    main()
