"""Checkpoints, resuming, quorum, sampling and state over rounds, in one process."""

import json
import shutil

import numpy as np
import pytest
from tampering import Killed, in_handshake, killed_in, silent

from common.configio import flatten
from common.data.dataset import open_hospitals
from common.errors import RunFailed
from common.rundir import RunDirectory
from common.training.hospital_data import encode_hospital
from common.training.loop import TrainState, train
from common.training.worker import Worker
from server.timeouts import Pace


def killed_at(count):
    """Die when the given number of messages has been sent."""
    sent = 0

    def on_message(grid, message):
        nonlocal sent
        sent += 1
        if sent == count:
            raise Killed

    return on_message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "order"), [("fedavg", "first-start"), ("fedadam", "shuffled")]
)
def test_run_killed_anywhere_ends_in_the_same_b(strategy, order, tiny_config, in_process, copy_run):
    """Killed before its first, middle and last messages; the strategy's moments and each pass's
    order of drugs come back too."""
    config = tiny_config(
        federation__strategy=strategy,
        federation__rounds=3,
        train__schedule="cosine",
        data__drug_order=order,
    )
    uninterrupted = in_process(config)
    sent = sum(direction == "down" for direction, _, _ in uninterrupted.grid.messages)
    for count in (2, sent // 3, sent // 2, 2 * sent // 3, sent):
        with pytest.raises(Killed):
            in_process(config, on_message=killed_at(count))
        run = RunDirectory(sorted(uninterrupted.run.path.parent.glob("run-*"), key=number)[-1])
        assert not (run.path / "summary.json").exists()
        resumed = in_process(run.config(), resume=copy_run(run))
        assert resumed.sha == uninterrupted.sha
        assert resumed.summary["validation_loss"] == uninterrupted.summary["validation_loss"]
        for name in ("train-loss", "weight", "steps"):
            assert events(resumed, name) == events(uninterrupted, name)
        assert steps_done(resumed.run) == steps_done(uninterrupted.run)


def number(path):
    return int(path.name.removeprefix("run-"))


def events(federation, name):
    return [(e.round, e.hospital, e.value) for e in federation.run.metrics(name)]


def steps_done(run):
    """Rounds and steps of each hospital's own log."""
    return {
        file.parent.name: [(r["round"], r["step"]) for r in map(json.loads, file.open())]
        for file in sorted(run.path.glob("hospitals/*/steps.jsonl"))
    }


TORN = ("metrics.jsonl", "wire.jsonl", "privacy.jsonl", "hospitals/hospital-2/steps.jsonl")


@pytest.mark.slow
def test_run_with_torn_last_lines_goes_on(tiny_config, in_process, copy_run):
    """Power was lost within the last write of every file: the resumed run ends, and reads all."""
    config = tiny_config(
        privacy__target_epsilon=6.0,
        privacy__delta=1e-4,
        privacy__sampling_rate=0.25,
        privacy__expected_batch=4.0,
        federation__local_steps=1,
    )
    done = in_process(config)
    run = copy_run(done.run)
    shutil.rmtree(run.path / "checkpoints" / "round-00002")
    (run.path / "summary.json").unlink()
    for name in TORN:
        file = run.path / name
        file.write_bytes(file.read_bytes()[:-20])
    resumed = in_process(config, resume=run)
    for name in TORN:
        assert resumed.run.lines(name)
    last = {line["hospital"]: line["steps"] for line in resumed.run.lines("privacy.jsonl")}
    assert last == dict.fromkeys(("hospital-1", "hospital-2", "hospital-3"), 2)


def test_hospital_state_is_what_makes_it_equal(tiny_config, in_process, copy_run):
    """A resumed run whose hospitals have lost their optimizer state ends elsewhere."""
    config = tiny_config(federation__rounds=3)
    uninterrupted = in_process(config)
    run = copy_run(uninterrupted.run)
    shutil.rmtree(run.path / "checkpoints" / "round-00003")
    for file in run.path.glob("hospitals/*/state-*.safetensors"):
        file.unlink()
    assert in_process(run.config(), resume=run).sha != uninterrupted.sha


@pytest.mark.slow
def test_replies_in_any_order_give_the_same_b(tiny_config, in_process):
    config = tiny_config(federation__hospitals=5)
    expected = in_process(config)
    for seed in range(2):
        shuffled = in_process(config, order=np.random.default_rng(seed))
        assert shuffled.sha == expected.sha
        assert shuffled.summary["validation_loss"] == expected.summary["validation_loss"]


def test_one_hospital_equals_the_plain_loop(tiny_config, in_process):
    """Rounds with kept state are one uninterrupted training: the same B, bit for bit."""
    config = tiny_config(federation__hospitals=1, federation__rounds=3, train__schedule="linear")
    federated = in_process(config)
    session = Worker().session(config)
    data = encode_hospital(open_hospitals(config).hospitals[0], session, config)
    session.adapter.flat.zero_()
    metrics = train(
        session, data.train, config.train, TrainState(), steps=6, schedule_steps=6, stream=data.name
    )
    (file,) = federated.run.path.glob("workers/*.json")
    worker = json.loads(file.read_text())
    assert worker["tokens"] == metrics.tokens > 0
    rate = worker["tokens"] / worker["training_seconds"]
    assert federated.summary["tokens_per_second"] == pytest.approx(rate, rel=0.01)
    ours = federated.run.load_checkpoint().b
    difference = max(np.abs(ours[k] - v).max() for k, v in session.adapter.state().items())
    assert difference <= 1e-6
    assert max(np.abs(v).max() for v in ours.values()) > 1e-3


def test_reset_state_starts_a_new_optimizer_on_the_next_batches(tiny_config, in_process):
    """``train.keep-state = false``: a plain loop with a fresh optimizer each round, same data."""
    config = tiny_config(federation__hospitals=1, federation__rounds=2, train__keep_state=False)
    federated = in_process(config)
    session = Worker().session(config)
    data = encode_hospital(open_hospitals(config).hospitals[0], session, config)
    session.adapter.flat.zero_()
    for start in (0, 2):
        state = TrainState(step=start)
        train(session, data.train, config.train, state, steps=2, schedule_steps=4, stream=data.name)
    ours = federated.run.load_checkpoint().b
    for key, value in session.adapter.state().items():
        np.testing.assert_allclose(ours[key], value, atol=1e-6)
    kept = in_process(tiny_config(federation__hospitals=1, federation__rounds=2))
    assert kept.sha != federated.sha
    assert not list(federated.run.path.glob("hospitals/*/state-*"))


@pytest.mark.slow
def test_below_quorum_the_run_fails_and_the_last_checkpoint_stays(
    tiny_config, in_process, tmp_path
):
    """Two of three are lost from round 2 on; quorum 0.5 needs two."""
    lost = silent("train", lambda number: number == 2)
    config = tiny_config(federation__rounds=3, federation__timeout_seconds=0.3)
    with pytest.raises(
        RunFailed, match=r"round 2: 1 of 3 hospitals answered, the quorum is 2"
    ) as e:
        in_process(config, tamper={0: lost, 1: lost})
    assert "hospital-1: no answer in time; hospital-2: no answer in time" in str(e.value)
    run = RunDirectory(tmp_path / "run-1")
    assert run.checkpoint_names() == ["round-00000", "round-00001"]
    assert not (run.path / "summary.json").exists()
    # With the hospitals back the run goes on from there, to the end it would have had.
    healed = in_process(run.config(), resume=run)
    whole = in_process(tiny_config(federation__rounds=3, federation__timeout_seconds=0.3))
    assert healed.sha == whole.sha


def test_all_timed_out_is_a_failure_not_a_silent_round(tiny_config, in_process):
    nobody = dict.fromkeys(range(3), silent("train"))
    with pytest.raises(RunFailed, match="0 of 3 hospitals answered"):
        in_process(tiny_config(federation__timeout_seconds=0.3), tamper=nobody)


def test_timeout_is_sized_from_what_was_measured(tiny_config, in_process):
    """Messages live as long as the wait: 12 h before anything was measured, then a multiple."""
    done = in_process(tiny_config())
    lives = [
        (message.metadata.message_type, message.metadata.ttl)
        for _, message in done.grid.wire("down")
    ]
    trains = [ttl for kind, ttl in lives if kind == "train"]
    assert trains[:3] == [43_200.0] * 3
    assert all(ttl < 43_200 / 10 for ttl in trains[3:])
    slow = Pace(seconds=100.0, steps=10, hospitals=3)
    assert Pace.limit(slow, steps=10, hospitals=3) == 500.0
    assert Pace.limit(slow, steps=40, hospitals=6) == 4000.0
    assert Pace.limit(slow, steps=5, hospitals=1) == 500.0
    assert Pace.limit(Pace(seconds=1e5, steps=1, hospitals=1), steps=1, hospitals=1) == 43_140.0


@pytest.mark.slow
def test_hospitals_are_sampled_by_name_with_the_named_seed(tiny_config, in_process):
    """The same hospitals whatever the node ids; another seed chooses others; all get a turn."""

    def asked(*, places=(), **overrides):
        config = tiny_config(
            federation__hospitals=5,
            federation__fraction=0.4,
            federation__rounds=5,
            federation__local_steps=1,
            evaluation__validation_samples=1,
            **overrides,
        )
        done = in_process(config, places=places)
        return part_in(done), done.sha

    first, sha = asked()
    assert [sum(r == n for r, _ in first) for n in range(1, 6)] == [2] * 5
    assert asked(places=(3, 0, 4, 1, 2)) == (first, sha)
    assert asked(federation__seed=1)[0] != first
    assert len({name for _, name in first}) >= 4


def part_in(federation):
    """Round and hospital of every update."""
    return sorted((e.round, e.hospital) for e in federation.run.metrics("steps"))


FOREIGN = in_handshake(**{"source-sha256": "e" * 64})
"""Another source digest in the handshake."""


@pytest.mark.slow
@pytest.mark.parametrize(("fraction", "asked", "tamper"), [(0.4, 2, {}), (0.5, 3, {4: FOREIGN})])
def test_resumed_run_samples_as_if_the_lost_hospital_were_away(
    fraction, asked, tamper, tiny_config, in_process, tmp_path
):
    """Hospital 5, admitted or refused, leaves after round 1; the run is killed in round 2."""
    config = tiny_config(
        federation__hospitals=5,
        federation__fraction=fraction,
        federation__mismatch="refuse",
        federation__rounds=4,
        federation__local_steps=1,
        federation__min_hospitals=4,
        evaluation__validation_samples=1,
    )

    def leaves(index, seen):
        return index != 4 or seen < 1

    whole = in_process(config, online=leaves, tamper=tamper)
    with pytest.raises(Killed):
        in_process(config, online=leaves, tamper=tamper, on_message=killed_in(2))
    run = RunDirectory(tmp_path / "run-2")
    resumed = in_process(config, resume=run, online=lambda index, seen: index != 4)
    assert part_in(resumed) == part_in(whole)
    assert [sum(r == n for r, _ in part_in(whole)) for n in range(1, 5)] == [asked] * 4
    assert resumed.sha == whole.sha


def test_hospitals_join_late_drop_out_and_come_back(tiny_config, in_process):
    """Hospital 3 joins in round 2, hospital 1 is away in round 2 and back in round 3."""

    def online(index, seen):
        return {0: seen != 1, 1: True, 2: seen >= 1}[index]

    config = tiny_config(federation__rounds=3, federation__min_hospitals=2)
    done = in_process(config, online=online)
    took_part = {
        n: sorted(e.hospital for e in done.run.metrics("steps") if e.round == n) for n in (1, 2, 3)
    }
    assert took_part == {
        1: ["hospital-1", "hospital-2"],
        2: ["hospital-2", "hospital-3"],
        3: ["hospital-1", "hospital-2", "hospital-3"],
    }
    assert in_process(config, online=online).sha == done.sha
    steps = steps_done(done.run)
    assert steps["hospital-1"] == [(1, 1), (1, 2), (3, 3), (3, 4)]


def test_late_hospital_with_other_code_is_refused_and_the_run_goes_on(tiny_config, in_process):
    config = tiny_config(federation__min_hospitals=2)
    done = in_process(config, online=lambda i, seen: i < 2 or seen >= 1, tamper={2: FOREIGN})
    assert [(n, name) for n, name, _ in done.refused()] == [(2, "hospital-3")]
    assert "source fingerprint differs" in done.refused()[0][2]
    assert len(done.run.metrics("steps")) == 4


LIMIT_SECONDS = 0.4


def impatient(tiny_config, *, rounds, needed):
    """One step a round, a short wait, and whoever does not fit is left out."""
    return tiny_config(
        federation__rounds=rounds,
        federation__local_steps=1,
        federation__min_hospitals=needed,
        federation__mismatch="refuse",
        federation__timeout_seconds=LIMIT_SECONDS,
    )


def queries_to(federation, index):
    """Round of the query and longest wait (seconds) of each handshake with a hospital."""
    lines = federation.run.wire()
    sent = [line for line in lines if line.direction == "down"]
    found = []
    for line, (place, message) in zip(sent, federation.grid.wire("down"), strict=True):
        if line.kind == "query" and place == index:
            found.append((line.round, round(message.metadata.ttl - 60, 6)))
    return found


def mute_until(answers_at):
    """Let the handshakes before the given one (from 1) pass without an answer."""
    asked = 0

    def tamper(message, reply):
        nonlocal asked
        asked += message.metadata.message_type == "query"
        return reply if asked >= answers_at else None

    return tamper


@pytest.mark.slow
def test_mute_node_costs_the_whole_wait_once(tiny_config, in_process):
    """It is connected and never answers: asked in ever fewer rounds, with ever shorter waits."""
    config = impatient(tiny_config, rounds=7, needed=2)
    done = in_process(config, tamper={2: mute_until(99)})
    assert queries_to(done, 2) == [(0, 0.4), (2, 0.2), (6, 0.1)]
    assert [at for at, _, _ in done.refused()] == [0, 2, 6]
    assert len(done.run.metrics("steps")) == 2 * 7
    late = in_process(config, tamper={2: mute_until(2)})
    assert queries_to(late, 2) == [(0, 0.4), (2, 0.2)]
    assert [r for r, name in part_in(late) if name == "hospital-3"] == [2, 3, 4, 5, 6, 7]


def test_mute_node_does_not_share_the_wait_of_a_late_hospital(tiny_config, in_process):
    """Hospital 2 joins in round 2, when the mute hospital 3 is due again."""
    config = impatient(tiny_config, rounds=3, needed=1)
    done = in_process(
        config, tamper={2: mute_until(99)}, online=lambda index, seen: index != 1 or seen >= 1
    )
    assert queries_to(done, 1) == [(2, 0.4)]
    assert queries_to(done, 2) == [(0, 0.4), (3, 0.2)]


def test_mute_node_that_reconnects_is_asked_at_once(tiny_config, in_process):
    config = impatient(tiny_config, rounds=3, needed=2)
    done = in_process(
        config, tamper={2: mute_until(3)}, online=lambda index, seen: index != 2 or seen != 1
    )
    assert queries_to(done, 2) == [(0, 0.4), (3, 0.4)]


def test_checkpoint_tells_the_whole_configuration(tiny_config, in_process):
    done = in_process(tiny_config(federation__rounds=1))
    facts = done.run.load_checkpoint().facts
    assert facts.config == flatten(done.run.config())
    assert facts.round == 1
    assert facts.b_sha256 == done.sha
