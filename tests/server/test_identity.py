"""A hospital's name is bound to its key: whoever takes it is refused, also when it is away."""

from dataclasses import replace

import pytest

import client.app
from client.policy import POLICY
from common.errors import RunFailed, UserError
from common.wire.contract import Fingerprints
from common.wire.handshake import check_handshake
from common.wire.identity import (
    NODE_KEY,
    SIGNATURE,
    Impostor,
    check_signature,
    new_nonce,
    read_keys,
    sign,
)
from server.nodes import LeftOut
from server.roster import Roster
from sim.flower.certificates import new_key, private_openssh, public_openssh

NAMES = ("north", "south", "west")


@pytest.fixture
def keyed(tmp_path, monkeypatch):
    """Three deployed hospitals with keys; what changes a node's configuration is returned."""
    own, public = tmp_path / "own", tmp_path / "nodes"
    public.mkdir()
    for name in NAMES:
        (own / name).mkdir(parents=True)
        key = new_key()
        (own / name / NODE_KEY).write_text(private_openssh(key))
        (own / name / POLICY).write_text("")
        (public / f"{name}.pub").write_text(public_openssh(key))
    changes: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    honest = client.app._answer

    def as_deployed(kind, message, context):
        name = NAMES[context.node_config["partition-id"]]
        node = {"hospital": name, "data": "synthetic", "folder": str(own / name), **changes[name]}
        return honest(kind, message, replace(context, node_config=node))

    monkeypatch.setattr(client.app, "_answer", as_deployed)
    return changes, public


@pytest.fixture
def config(tiny_config, keyed):
    return tiny_config(
        run__hospital_keys=str(keyed[1]), federation__min_hospitals=2, federation__rounds=3
    )


def test_honest_hospitals_are_admitted(config, in_process):
    done = in_process(config)
    assert [one["name"] for one in done.summary["hospitals"]] == sorted(NAMES)
    asked = [line for line in done.run.wire() if line.kind == "query"]
    assert {line.scalars for line in asked if line.direction == "down"} == {("nonce", "round")}
    assert all("signature" in line.scalars for line in asked if line.direction == "up")
    assert all(line.unknown is None for line in asked)


@pytest.mark.slow
@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("mismatch", ["stop", "refuse"])
def test_a_hospital_that_takes_another_s_name_is_refused(
    config, keyed, in_process, away, mismatch, caplog
):
    """``west`` has a registered key of its own, and calls itself ``north``: beside the real one,
    or once that one has gone."""
    changes, _ = keyed
    changes["west"] = {"hospital": "north"}
    federation = replace(config.federation, mismatch=mismatch, quorum=0.3)

    def online(index, server_round):
        if NAMES[index] == "north":
            return not away or server_round < 2
        return NAMES[index] == "south" or not away or server_round >= 2

    done = in_process(replace(config, federation=federation), online=online)
    assert "it calls itself north, and has not signed with north's key" in caplog.text
    trained = {(e.hospital, e.round) for e in done.run.metrics("steps")}
    assert {round_ for name, round_ in trained if name == "south"} == {1, 2, 3}
    expected = {1, 2} if away else {1, 2, 3}
    assert {round_ for name, round_ in trained if name == "north"} == expected
    impostor = done.grid.node(NAMES.index("west"))
    asked = [d for d, index, _ in done.grid.messages if done.grid.node(index) == impostor]
    assert asked == ["down", "up"]  # one question, and never again
    assert f"node {impostor} is left out" in caplog.text


def test_an_impostor_is_nobody_to_wait_for():
    """A hospital that was refused has come; whoever is no hospital has not."""
    roster = Roster(Fingerprints(a="a", backbone="b", source="s"))
    roster.nodes = {
        1: LeftOut(name="south", reason="another backbone"),
        2: LeftOut(name="node 2", reason="no registered key", impostor=True),
    }
    assert len(roster.arrived) == 1
    assert roster.known == 1


def test_a_handshake_of_another_node_or_an_old_one_proves_nothing(tmp_path, keyed):
    """Relayed, replayed, altered, or unsigned."""
    _, public = keyed
    keys, folder, nonce = read_keys(public), tmp_path / "own" / "north", new_nonce()
    facts = {"hospital": "north", "of": 3, "device": "cpu"}
    handshake = {**facts, SIGNATURE: sign(folder, nonce, 7, facts)}
    check_signature(keys, nonce, 7, handshake)
    for number, node, told in [
        (new_nonce(), 7, handshake),
        (nonce, 8, handshake),
        (nonce, 7, {**handshake, "of": 2}),
        (nonce, 7, {**handshake, "hospital": "south"}),
        (nonce, 7, {**handshake, SIGNATURE: "00" * 40}),
    ]:
        with pytest.raises(Impostor, match="has not signed with"):
            check_signature(keys, number, node, told)
    with pytest.raises(Impostor, match="which is no hospital of this deployment"):
        check_signature(keys, nonce, 7, {**handshake, "hospital": "nobody"})
    with pytest.raises(Exception, match="no scalar"):
        check_handshake({"hospital": "north"}, private=False, signed=True)


def test_what_a_hospital_signs_is_no_login_of_flower_s(tmp_path, keyed):
    """Flower's nodes sign a bare time stamp with the same key."""
    from flwr.supercore.primitives.asymmetric import verify_signature

    key = read_keys(keyed[1])["north"]
    stamp = "2026-01-01T00:00:00+00:00"
    signature = bytes.fromhex(sign(tmp_path / "own" / "north", stamp, 1, {"hospital": "north"}))
    assert not verify_signature(key, stamp.encode(), signature)


def test_a_hospital_without_its_key_says_so(config, tmp_path, in_process):
    (tmp_path / "own" / "south" / NODE_KEY).unlink()
    with pytest.raises(RunFailed, match="this hospital has no node.key"):
        in_process(config)


def test_a_folder_without_keys_is_refused(tmp_path):
    with pytest.raises(UserError, match="no NAME.pub there"):
        read_keys(tmp_path)
    (tmp_path / "north.pub").write_text("ssh-ed25519 AAAA")
    with pytest.raises(UserError, match="no hospital's key"):
        read_keys(tmp_path)


def test_a_nonce_that_is_none_is_not_signed(config, keyed, in_process):
    def longer(grid, message):
        record = message.content.config_records.get("config", {})
        if "nonce" in record:
            record["nonce"] = "x" * 32

    def start():
        in_process(config, on_message=longer)

    with pytest.raises(RunFailed, match="is not 32 hexadecimal digits"):
        start()
