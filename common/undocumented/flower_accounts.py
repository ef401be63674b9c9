"""Flower: the plug-in that its Control API asks who calls, and its file of tokens.

Seen in 1.41.0 and 1.42.0.
"""

from flwr.cli.constant import ACCESS_TOKEN_STORE_KEY, AUTHN_TYPE_STORE_KEY, REFRESH_TOKEN_STORE_KEY
from flwr.common.constant import ACCESS_TOKEN_KEY, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, AuthnType
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.supercore.credential_store import FileCredentialStore
from flwr.superlink.auth_plugin import ControlAuthnPlugin

__all__ = [
    "ACCESS_TOKEN_KEY",
    "ACCESS_TOKEN_STORE_KEY",
    "AUTHN_TYPE_STORE_KEY",
    "NOOP_ACCOUNT_NAME",
    "NOOP_FLWR_AID",
    "REFRESH_TOKEN_STORE_KEY",
    "AccountAuthCredentials",
    "AccountAuthLoginDetails",
    "AccountInfo",
    "AuthnType",
    "ControlAuthnPlugin",
    "FileCredentialStore",
]
