"""Kept updates: all that a round was made of, and nothing that the protection takes away."""

import numpy as np
import pytest

from common.errors import UserError
from common.privacy.settings import plan_of
from common.tensor_files import Altered
from server.kept_updates import read

REFUSED = 1


def spoil(message, reply):
    if message.metadata.message_type == "train" and message.content["config"]["round"] == 2:
        reply.content["metrics"]["weight"] = -1.0
    return reply


def test_each_round_s_b_is_the_mean_of_what_was_kept(tiny_config, in_process):
    """By numpy, from the files alone; who was refused in a round is in none of it."""
    done = in_process(tiny_config(federation__keep_updates=True), tamper={REFUSED: spoil})
    names = [f"hospital-{number}" for number in (1, 2, 3)]
    for number, hospitals in ((1, names), (2, [names[0], names[2]])):
        kept = read(done.run, number)
        assert [update.hospital for update in kept] == hospitals
        weights = np.array([update.weight for update in kept])
        b = done.run.load_checkpoint(f"round-{number:05d}").b
        assert all(set(update.b) == set(b) for update in kept)
        for key, value in b.items():
            stacked = np.stack([update.b[key].astype(np.float64) for update in kept])
            np.testing.assert_allclose(
                value, np.average(stacked, axis=0, weights=weights), rtol=1e-6, atol=1e-9
            )
    plain = in_process(tiny_config(), tamper={REFUSED: spoil})
    assert plain.sha == done.sha
    assert not (plain.run.path / "updates").exists()
    assert read(plain.run, 1) == []


def test_what_was_altered_is_refused(tiny_config, in_process):
    run = in_process(tiny_config(federation__keep_updates=True, federation__rounds=1)).run
    file = run.path / "updates" / "round-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Altered, match=r"round-00001.safetensors is damaged"):
        read(run, 1)


def test_a_resumed_run_replaces_the_round_that_was_interrupted(tiny_config, in_process, copy_run):
    """What the process had kept before it died is written again, with the same content."""
    config = tiny_config(federation__keep_updates=True)
    whole = in_process(config)
    run = copy_run(whole.run)
    for name in run.checkpoint_names()[1:]:
        run.remove_checkpoint(name)
    before = [update.b for update in read(run, 2)]
    (run.path / "updates" / "round-00002.safetensors").write_bytes(b"torn")
    assert in_process(config, resume=run).sha == whole.sha
    for ours, theirs in zip(before, [update.b for update in read(run, 2)], strict=True):
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_bare_updates_are_not_kept_where_hospitals_are_protected(tiny_config):
    """A patient-level update is released, charged and noised, before the server has it."""
    private = {"privacy__noise_multiplier": 1.0, "federation__keep_updates": True}
    with pytest.raises(UserError, match="before it is clipped and noised"):
        plan_of(tiny_config(**private, privacy__unit="hospital"))
    assert plan_of(tiny_config(**private)).unit == "patient"
