"""A run directory goes on as it began, or stays as it is, however the server was started."""

import re
from dataclasses import replace

import pytest
from flwr.app import Context, RecordDict

from common.configio import flatten
from common.errors import RunFailed
from common.tensor_files import Altered
from server.app import main

CHANGES = {
    "train.learning-rate": (0.5, "train.learning-rate: 0.02 -> 0.5"),
    "federation.strategy": ("fedadam", "federation.strategy: 'fedavg' -> 'fedadam'"),
    "federation.rounds": (3, "federation.rounds: 1 -> 3"),
    "adapter.seed": (5, "adapter.seed: 0 -> 5; a fingerprint: "),
}


@pytest.fixture
def finished(tiny_config, in_process):
    return in_process(tiny_config(federation__rounds=1))


def start_again(finished, config, **told):
    """Start the server app on a finished run's directory, as plain ``flwr run`` does."""
    config = replace(config, run=replace(config.run, directory=str(finished.run.path)))
    grid = type(finished.grid)(config)
    main(grid, Context(7, 1, {}, RecordDict(), {**flatten(config), **told}))
    return grid


def content(run):
    return {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("key", CHANGES)
def test_changed_configuration_is_refused_and_nothing_is_written(key, finished, tiny_config):
    value, difference = CHANGES[key]
    before = content(finished.run)
    with pytest.raises(RunFailed, match=re.escape(difference)):
        start_again(finished, tiny_config(**{"federation.rounds": 1, key: value}))
    assert content(finished.run) == before


@pytest.mark.parametrize("name", ["a", "backbone"])
def test_other_a_or_backbone_is_refused(name, finished, tiny_config):
    """The same configuration, but what it names is not what it was."""
    kept = finished.run.load_checkpoint("round-00001")
    other = {**kept.facts.inputs, name: "e" * 64}
    facts = kept.facts.model_copy(update={"inputs": other})
    finished.run.save_checkpoint(kept.name, kept.b, facts=facts, extra=kept.extra)
    with pytest.raises(RunFailed, match=f"changed: {name} fingerprint: {'e' * 64} -> "):
        start_again(finished, tiny_config(federation__rounds=1))


@pytest.mark.parametrize("part", ["b.safetensors", "extra.safetensors", "facts.json"])
def test_one_flipped_bit_of_the_last_checkpoint_is_refused(part, tiny_config, in_process):
    """The strategy's moments are in ``extra``: with others a resumed run ends in another B."""
    config = tiny_config(federation__rounds=1, federation__strategy="fedadam")
    done = in_process(config)
    file = done.run.path / "checkpoints" / "round-00001" / part
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Altered, match="^checkpoint round-00001 is damaged, was altered") as caught:
        start_again(done, config)
    assert "\n" not in str(caught.value)
    assert done.run.status().state == "failed"


def test_unchanged_configuration_goes_on(finished, tiny_config):
    """Under another name, and told another number of hospitals: they say how many they are."""
    sha = finished.sha
    config = tiny_config(federation__rounds=1, run__name="moved")
    grid = start_again(finished, config, **{"federation.hospitals": 4})
    assert [kind for kind, _, _ in grid.messages] == ["down", "up"] * 3
    assert finished.run.status().state == "finished"
    assert finished.sha == sha
