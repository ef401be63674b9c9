"""A resumed run needs the hospitals that its next round needs, and no more."""

import pytest
from tampering import Killed, killed_in

from common.errors import RunFailed
from common.rundir import RunDirectory
from server.timeouts import RECONNECT_SECONDS


@pytest.fixture
def killed(in_process, tmp_path):
    """Run until the first train message of round 2; return the run directory."""

    def start(config):
        with pytest.raises(Killed):
            in_process(config, on_message=killed_in(2))
        return RunDirectory(max(tmp_path.glob("run-*")))

    return start


def back_after(looks, index):
    """Connect a hospital when the server has looked so many times for each."""
    seen = 0

    def online(one, seen_round):
        nonlocal seen
        seen += one == index
        return one != index or seen > looks

    return online


def test_hospital_that_is_away_for_good_does_not_end_a_resumed_run(tiny_config, in_process, killed):
    """As the uninterrupted run, from which it left after round 1; the quorum is 2 of 3."""
    config = tiny_config(federation__rounds=3, federation__timeout_seconds=1.0)
    run = killed(config)
    whole = in_process(config, online=lambda index, seen: index != 2 or seen < 1)
    resumed = in_process(config, resume=run, online=lambda index, seen: index != 2)
    assert resumed.sha == whole.sha


def test_resumed_run_waits_a_moment_for_who_comes_back(tiny_config, in_process, killed):
    """Two of three would do, but the third connects right after them: nobody lost its round."""
    config = tiny_config(federation__rounds=3)
    whole = in_process(config)
    resumed = in_process(config, resume=killed(config), online=back_after(2, 2))
    assert resumed.sha == whole.sha


def test_moment_is_shorter_than_the_longest_wait(tiny_config, in_process, killed):
    """Without it half an hour would pass."""
    config = tiny_config()
    run = killed(config)
    resumed = in_process(config, resume=run, online=lambda index, seen: index != 2)
    assert resumed.run.status().state == "finished"
    assert 0 < resumed.clock.now - RECONNECT_SECONDS <= 1


def test_resumed_run_with_nobody_there_fails_after_the_wait(tiny_config, in_process, killed):
    config = tiny_config(federation__timeout_seconds=0.6)
    run = killed(config)
    with pytest.raises(RunFailed, match="0 of 3 hospitals are connected after 1 s"):
        in_process(config, resume=run, online=lambda index, seen: False)


def test_the_only_hospital_may_come_back_last(tiny_config, in_process, killed):
    config = tiny_config(federation__only="hospital-3", federation__timeout_seconds=1.0)
    whole = in_process(config)
    resumed = in_process(config, resume=killed(config), online=back_after(4, 2))
    assert resumed.sha == whole.sha


def test_resumed_run_keeps_the_number_of_hospitals(tiny_config, in_process, killed):
    """Whoever counts otherwise now is refused, though it is the first to come."""
    run = killed(tiny_config())
    with pytest.raises(RunFailed, match="it counts 4 hospitals, the federation has 3"):
        in_process(tiny_config(federation__hospitals=4), resume=run)
