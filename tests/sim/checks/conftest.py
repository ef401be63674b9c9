"""A finished federation that kept its updates."""

import pytest

from common.rundir import RunDirectory
from sim.runs.federate import federate


@pytest.fixture(scope="module")
def kept_run(tiny_config, tmp_path_factory) -> RunDirectory:
    """Three hospitals, one round, answers of a few held-out admissions."""
    config = tiny_config(
        federation__keep_updates=True,
        federation__rounds=1,
        data__synthetic_patients=60,
        evaluation__samples=4,
        evaluation__max_new_tokens=8,
        run__backend="in-process",
    )
    folder = tmp_path_factory.mktemp("kept") / "run"
    return federate(config, command_line=[], run_dir=folder).directory
