"""The coordinator's token, and what its nginx passes."""

import re
import stat

import pytest
from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.superlink.dependencies.account import AccountAccessDependency
from flwr.superlink.routers.fleet.router import router as fleet

from common.errors import RunFailed
from sim.flower.guarded_superlink import CREDENTIALS, TokenAccount, read_token, write_token
from sim.flower.proxies import FLEET, coordinator_proxy, hospital_proxy

ADDRESS = "127.0.0.1:9093"


def test_only_the_token_is_let_in():
    account = TokenAccount("secret")
    for metadata in (
        [],
        [(ACCESS_TOKEN_KEY, "")],
        [(ACCESS_TOKEN_KEY, "Secret")],
        [("x", "secret")],
    ):
        assert account.validate_tokens_in_metadata(metadata) == (False, None)
        assert account.refresh_tokens(metadata) == (None, None)
    for token in ("secret", b"secret"):
        good, info = account.validate_tokens_in_metadata([(ACCESS_TOKEN_KEY, token)])
        assert good
        assert info is not None
    assert account.get_login_details() is None
    assert account.get_auth_tokens("x") is None
    assert AccountAccessDependency(account).authn_plugin is account


def test_the_token_lies_where_flower_s_command_looks(tmp_path, monkeypatch):
    """Read back by Flower's own plug-in."""
    from flwr.cli.auth_plugin.oidc_cli_plugin import OidcCliPlugin
    from flwr.supercore.credential_store import FileCredentialStore

    write_token(tmp_path, ADDRESS, "secret")
    assert stat.S_IMODE((tmp_path / CREDENTIALS).stat().st_mode) == 0o600
    assert read_token(tmp_path, ADDRESS) == "secret"
    plugin = OidcCliPlugin(ADDRESS)
    plugin.store = FileCredentialStore(tmp_path / CREDENTIALS)
    plugin.load_tokens()
    assert (ACCESS_TOKEN_KEY, "secret") in list(plugin.write_tokens_to_metadata([]))
    with pytest.raises(RunFailed, match="holds no token"):
        read_token(tmp_path, "127.0.0.1:1")


def test_fleet_alone_is_passed_and_registration_is_not():
    """Against the routes that Flower itself serves."""
    served = {route.path.rpartition("/")[2] for route in fleet.routes}
    assert served - set(FLEET) == {"register-node", "unregister-node"}
    assert set(FLEET) <= served
    text = coordinator_proxy(host="fl.example.org", port=9092, inside_port=9093)
    places = re.findall(r"location (\S+ ?\S*) \{", text)
    assert places == [f"~ ^/v1/fleet/({'|'.join(FLEET)})$", "/"]
    assert "location / { return 403; }" in text
    for line in ("listen 9092 ssl;", "ssl_verify_client on;", "ssl_protocols TLSv1.3;"):
        assert line in text
    assert "listen 127.0.0.1:9092 ssl;" in coordinator_proxy(
        host="127.0.0.1", port=9092, inside_port=9093
    )


def test_a_hospital_listens_on_loopback_and_checks_the_coordinator():
    text = hospital_proxy(host="2001:db8::1", port=9092, tunnel_port=9094)
    assert "listen 127.0.0.1:9094 ssl;" in text
    assert "proxy_pass https://[2001:db8::1]:9092;" in text
    for line in ("proxy_ssl_verify on;", "proxy_ssl_certificate node.pem;"):
        assert line in text
