"""What ``deploy`` writes, and how a hospital starts from it."""

import contextlib
import itertools
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from socket import AF_UNIX
from socket import socket as Socket

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID

import server.app
import sim.flower.run_hospital
import sim.flower.run_superlink
from client.node import local_config
from client.policy import Policy, read_policy
from client.resident_worker import listening
from client.site import read_site
from common.configio import config_digest, read_config
from common.errors import FedrxError, UserError
from common.files import locked
from common.privacy.settings import with_calibrated_noise
from common.provenance import source_digest
from sim.checks.doctor import examine_hospital
from sim.flower.children import Children
from sim.flower.deploy import deploy
from sim.flower.run_hospital import SECRET, _wait_for, run_hospital
from sim.flower.run_superlink import LOCK, run_superlink


def test_folder_of_a_deployment(tiny_config, tmp_path):
    """A hospital gets its own key and the authority's certificate, and nobody else's secrets."""
    readme = deploy(
        tiny_config(),
        tmp_path / "d",
        hospitals={"north": "/data/a b", "south": "/data/south"},
        host="fed.example.org",
        port=9092,
    )
    folder = readme.parent
    for name in ("north", "south"):
        own = folder / "hospitals" / name
        assert {p.name for p in own.iterdir()} == {
            *("node.key", "node.pub", "node-tls.key", "node.pem", "ca.pem", "start.sh"),
            *("local.key", "local.pem", "local-ca.pem", "nginx.conf", "site.toml", "policy.toml"),
            *("empty", "home"),
        }
        for secret in ("node.key", "node-tls.key", "local.key"):
            assert stat.S_IMODE((own / secret).stat().st_mode) == 0o600
        assert read_policy(own) == Policy()  # what it agrees to is the hospital's to say
    own = folder / "hospitals" / "north"
    assert read_site(own).data == "/data/a b"
    assert "proxy_pass https://fed.example.org:9092;" in (own / "nginx.conf").read_text()
    for secret in ("server.key", "superexec.secret", "home/credentials.yaml"):
        assert stat.S_IMODE((folder / "superlink" / secret).stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "authority" / "ca.key").stat().st_mode) == 0o600
    authority = x509.load_pem_x509_certificate((folder / "authority" / "ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "superlink" / "server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "fed.example.org" in names.get_values_for_type(x509.DNSName)
    assert isinstance(server.public_key(), ec.EllipticCurvePublicKey)
    for name in ("north", "south"):
        own = folder / "hospitals" / name
        mine = x509.load_pem_x509_certificate((own / "node.pem").read_bytes())
        mine.verify_directly_issued_by(authority)
        usage = mine.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]  # it can pose as no server
        assert mine.subject.rfc4514_string() == f"CN={name}"
        assert mine.public_key() == load_ssh_public_key((own / "node.pub").read_bytes())
    assert "federation.hospitals = 2" in (folder / "superlink" / "run-config.toml").read_text()
    with pytest.raises(UserError, match="not empty"):
        deploy(tiny_config(), folder, hospitals={"a": "/x"}, host="h", port=1)
    for bad in ("", "../x", "a b", "ä"):
        with pytest.raises(UserError, match="--hospital"):
            deploy(tiny_config(), tmp_path / "e", hospitals={bad: "/x"}, host="h", port=1)


@pytest.mark.process
def test_what_is_written_is_a_shell_script(tiny_config, tmp_path):
    nodes = {"north": "/data/a b"}
    folder = deploy(tiny_config(), tmp_path / "d", hospitals=nodes, host="h", port=1).parent
    assert subprocess.run(["sh", "-n", folder / "hospitals" / "north" / "start.sh"]).returncode == 0


def test_hospital_s_own_paths_replace_the_server_s(tiny_config):
    config = tiny_config(run__directory="/server/run")
    node = {"hospital": "north", "data": "/data/north", "folder": "/own"}
    own = local_config(config, node, run_id=7)
    assert own.data.path == "/data/north"
    assert Path(own.run.directory).is_relative_to("/own/runs")
    assert local_config(config, node, run_id=8) == own
    other = local_config(tiny_config(run__directory="/server/two"), node, run_id=7)
    assert other.run.directory != own.run.directory


@pytest.mark.slow
def test_a_private_deployment_states_its_noise(tiny_config, tmp_path):
    """So that no hospital has to calibrate it, and all of them agree to one configuration."""
    config = tiny_config(privacy__target_epsilon=6.0, privacy__sampling_rate=0.5)
    readme = deploy(config, tmp_path / "d", hospitals={"a": "/x", "b": "/y"}, host="h", port=1)
    sent = read_config(readme.parent / "superlink" / "run-config.toml")
    assert sent.privacy.noise_multiplier == with_calibrated_noise(config).privacy.noise_multiplier
    assert sent.run.hospital_keys == str(readme.parent / "superlink" / "nodes")
    written = (readme.parent / "hospitals" / "a" / "policy.toml").read_text()
    agreed = tomllib.loads(written.replace("# max", "max").replace("# allowed", "allowed"))
    policy = Policy.model_validate(agreed)
    assert policy.allowed_configurations == (config_digest(sent),)
    assert policy.allowed_digests == (source_digest(),)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("site.toml", 'hospital = "north"\ndatta = "/x"\n', "datta: unknown key"),
        ("site.toml", 'hospital = "../n"\ndata = "/x"\n', "hospital: String should match"),
        ("policy.toml", "max-epsilom = 1\n", "max-epsilom: unknown key"),
        ("policy.toml", f'allowed-digests = ["{"0" * 64}"]\n', "which allowed-digests does not"),
    ],
)
def test_a_hospital_starts_under_no_broken_terms(tiny_config, tmp_path, file, text, message):
    """And ``doctor`` says the same, without starting anything."""
    nodes = {"north": str(tmp_path)}
    readme = deploy(tiny_config(), tmp_path / "d", hospitals=nodes, host="h", port=1)
    own = readme.parent / "hospitals" / "north"
    good = {one.check: one.state for one in examine_hospital(own) if one.check != "nginx"}
    assert good == {"policy": "ok", "site": "ok", "code": "ok"}
    (own / file).write_text(text)
    with pytest.raises(FedrxError, match=message):
        run_hospital(own, print)
    bad = [one for one in examine_hospital(own) if one.state == "bad" and one.check != "nginx"]
    assert any(message in one.found and one.fix for one in bad)


def test_a_second_process_of_a_hospital_takes_nothing_from_the_first(
    tiny_config, tmp_path, monkeypatch
):
    """The first one's SuperNode may still have to read the secret."""
    monkeypatch.setattr(sim.flower.run_hospital, "nginx_command", lambda folder: ["nginx"])
    nodes = {"north": str(tmp_path)}
    readme = deploy(tiny_config(), tmp_path / "d", hospitals=nodes, host="h", port=1)
    own = readme.parent / "hospitals" / "north"
    (own / SECRET).write_text("of the first")
    with locked(own / LOCK), pytest.raises(UserError, match="takes part as north already"):
        run_hospital(own, print)
    assert (own / SECRET).read_text() == "of the first"


def test_a_second_superlink_starts_nothing(tiny_config, tmp_path, monkeypatch):
    """Its executor would take the runs of the first."""
    monkeypatch.setattr(sim.flower.run_superlink, "nginx_command", lambda folder: ["nginx"])
    monkeypatch.setattr(Children, "start", lambda *_: pytest.fail("something is started"))
    readme = deploy(tiny_config(), tmp_path / "d", hospitals={"a": "/x"}, host="h", port=1)
    link = readme.parent / "superlink"
    with locked(link / LOCK), pytest.raises(UserError, match="runs from .*superlink already"):
        run_superlink(link)


def test_the_socket_of_a_killed_worker_is_not_taken_for_a_worker(tmp_path):
    with Socket(AF_UNIX) as killed:
        killed.bind(str(tmp_path / "s"))
    looks = itertools.count(1)
    with contextlib.ExitStack() as worker:

        def check():
            if next(looks) == 2:
                worker.enter_context(listening(tmp_path / "s"))

        _wait_for(tmp_path / "s", check)
    assert next(looks) == 3


def test_the_readme_tells_how_to_go_on(tiny_config, tmp_path, in_process):
    """And that is what the code does: the same run directory, from its last checkpoint."""
    readme = deploy(
        tiny_config(), tmp_path / "d", hospitals={"a": "/x"}, host="h", port=1
    ).read_text()
    assert "`superlink/run.sh` again goes on in `run/` from its last checkpoint" in readme
    done = in_process(tiny_config())
    shutil.rmtree(done.run.path / "checkpoints" / "round-00002")
    again = in_process(tiny_config(), resume=server.app.run_directory(done.run.config()))
    assert again.run.path == done.run.path
    assert again.sha == done.sha
    rounds = [e.round for e in again.run.metrics("round-seconds")]
    assert rounds == [1, 2]
    assert in_process(tiny_config(), resume=again.run).sha == done.sha
