"""How long the server waits: for answers, for who has gone, for hospitals that keep failing."""

import pytest
from federation_fixtures import StandingClock
from flwr.app import Error, Message, RecordDict
from tampering import Killed, killed_in, on, silent

import server.messages
import server.timeouts
from common.errors import RunFailed
from common.rundir import RunDirectory
from common.wire.undocumented_flower import set_message_id
from server.messages import POLL_SECONDS, PRESENCE_SECONDS, exchange
from server.timeouts import Pace

HANGING = 1


def waits(federation, kind="train"):
    """Longest wait (seconds) for each message of a kind, in the order of sending."""
    messages = [message for _, message in federation.grid.wire("down")]
    return [m.metadata.ttl - 60 for m in messages if m.metadata.message_type == kind]


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(server.timeouts, "SHORTEST_SECONDS", 0.3)
    monkeypatch.setattr(server.timeouts, "LONGEST_SECONDS", 1.0)


@pytest.mark.parametrize("first_round", [1, 2])
def test_hanging_hospital_never_lengthens_the_wait(
    first_round, tiny_config, in_process, short_waits
):
    """Replies come at once here, so every wait that was measured is the shortest there is."""
    config = tiny_config(federation__rounds=4, federation__local_steps=1)
    late = silent("train", lambda number: number >= first_round)
    done = in_process(config, tamper={HANGING: late})
    assert waits(done) == pytest.approx([1.0] * 3 + [0.3] * 9)
    waited = {e.round: e.value for e in done.run.metrics("train-exchange-seconds")}
    assert all(0.3 <= waited[n] <= 0.3 + POLL_SECONDS for n in range(max(first_round, 2), 5))


def test_refused_reply_is_not_measured(tiny_config, in_process, monkeypatch):
    """The only accepted replies came at once; the refused one came late."""
    arrived = server.messages.exchange

    def late(grid, contents, **options):
        replies = arrived(grid, contents, **options)
        replies.seconds[grid.node(HANGING)] = 1000.0
        return replies

    monkeypatch.setattr("server.rounds.exchange", late)

    def spoil(message, reply):
        reply.content["metrics"]["weight"] = -1.0
        return reply

    limits = waits(in_process(tiny_config(), tamper={HANGING: on("train", spoil)}))
    assert limits[3:] == pytest.approx([60.0] * 3)
    assert waits(in_process(tiny_config()))[3:] == pytest.approx([5000.0] * 3)


def test_pace_comes_back_with_a_resumed_run(tiny_config, in_process, tmp_path):
    """The first wait after the resume is sized from what was measured before it."""
    config = tiny_config()
    with pytest.raises(Killed):
        in_process(config, on_message=killed_in(2))
    resumed = in_process(config, resume=RunDirectory(tmp_path / "run-1"))
    assert waits(resumed) == pytest.approx([60.0] * 3)


class LeavingGrid:
    """One node, which answers and goes when the server looks whether it is still there."""

    def __init__(self):
        self.replies = []

    def push_messages(self, messages):
        (message,) = messages
        name = set_message_id(message, "asked")
        self.reply = Message(content=message.content, reply_to=message)
        return [name]

    def pull_messages(self, message_ids):
        return [self.replies.pop() for _ in message_ids if self.replies]

    def get_node_ids(self):
        self.replies.append(self.reply)
        return []


def test_the_answer_of_one_that_has_gone_counts():
    """It came between the server's last look for answers and its look who is there."""
    replies = exchange(
        LeavingGrid(),
        {7: RecordDict()},
        kind="train",
        timeout_seconds=60.0,
        names={7: "north"},
        on_message=lambda *_: None,
        clock=StandingClock(),
    )
    assert list(replies.messages) == [7]
    assert not replies.timed_out


def test_who_disconnects_is_not_waited_for(tiny_config, in_process):
    """Asked, and then gone: the round goes on without the rest of its wait."""
    config = tiny_config(federation__rounds=1, federation__timeout_seconds=20.0)
    done = in_process(
        config,
        tamper={HANGING: silent("train")},
        online=lambda index, seen: index != HANGING or seen < 1,
    )
    assert 0 < done.clock.now - PRESENCE_SECONDS <= 2 * POLL_SECONDS
    assert [(at, name) for at, name, _ in done.refused()] == [(1, "hospital-2")]


def test_pace_of_the_slowest_is_kept():
    fast, slow = (Pace(seconds=s, steps=1, hospitals=1) for s in (1.0, 2.0))
    assert Pace.slower(None, slow, timed_out=True) == slow
    assert Pace.slower(slow, fast, timed_out=False) == slow
    assert Pace.slower(fast, slow, timed_out=False) == slow
    assert Pace.slower(fast, slow, timed_out=True) == fast


def failing_handshake(times):
    """Answer the first handshakes with a failure."""
    asked = 0

    def tamper(message, reply):
        nonlocal asked
        asked += 1
        failure = Message(Error(code=2, reason="its worker is not up"), reply_to=message)
        return failure if asked <= times else reply

    return on("query", tamper)


def test_failing_handshake_is_asked_ever_more_rarely_and_told(tiny_config, in_process, tmp_path):
    config = tiny_config(federation__mismatch="refuse", federation__timeout_seconds=3.6)
    told = r"2 of 3 hospitals are connected after 4 s; node 107: .*its worker is not up"
    with pytest.raises(RunFailed, match=told):
        in_process(config, tamper={HANGING: failing_handshake(99)})
    assert len(RunDirectory(tmp_path / "run-1").metrics("refused")) == 3  # after 0, 1 and 3 s


def test_handshake_that_fails_at_first_is_asked_again(tiny_config, in_process):
    config = tiny_config(
        federation__mismatch="refuse", federation__rounds=1, federation__timeout_seconds=10.0
    )
    done = in_process(config, tamper={HANGING: failing_handshake(1)})
    assert [(at, name) for at, name, _ in done.refused()] == [(0, "node 107")]
    assert len(done.run.metrics("steps")) == 3


def test_round_that_lacks_hospitals_tells_why_they_are_left_out(tiny_config, in_process):
    """Hospital 2 fails in every handshake, and hospital 3 leaves before round 2."""
    config = tiny_config(
        federation__mismatch="refuse",
        federation__timeout_seconds=0.6,
        federation__min_hospitals=2,
        federation__quorum=1.0,
    )
    with pytest.raises(RunFailed, match=r"the quorum is 2 of 2; node 107: .*not up"):
        in_process(
            config,
            tamper={HANGING: failing_handshake(99)},
            online=lambda index, seen: index != 2 or seen < 1,
        )
