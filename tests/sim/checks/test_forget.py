"""``fedrx forget``: the replay, the run that never had the hospital, and what is said of both."""

import json

import pytest

import sim.checks.forget
from common.errors import UserError
from common.provenance import tensors_sha256
from common.rundir import RunDirectory
from common.tensor_files import read_tensors
from sim.checks.audit_membership import MEMBERSHIP
from sim.checks.forget import B_FILE, FORGET, NEVER, REPLAYED, RUN, forget


def test_after_one_round_nothing_of_the_hospital_is_left(kept_run, monkeypatch):
    """The replay is then the B of the run that never had it; a second call trains nothing."""
    found = forget(kept_run, "hospital-2", command_line=[])
    never = RunDirectory.open(kept_run.path / "without-hospital-2" / "never")
    assert {one.hospital for one in never.metrics("steps")} == {"hospital-1", "hospital-3"}
    models = found.models
    assert models[REPLAYED].b_sha256 == models[NEVER].b_sha256 == never.summary().b_sha256
    assert models[RUN].b_sha256 == kept_run.summary().b_sha256 != models[NEVER].b_sha256
    assert models[REPLAYED].distance == 0 < models[RUN].distance
    assert models[REPLAYED].loss_of_hospital == models[NEVER].loss_of_hospital
    assert models[RUN].loss_of_others != models[NEVER].loss_of_others
    folder = kept_run.path / "without-hospital-2"
    assert tensors_sha256(read_tensors(folder / B_FILE)) == models[REPLAYED].b_sha256
    assert json.loads((folder / FORGET).read_text()) == found.as_json()
    monkeypatch.setattr("sim.runs.cells.federate", None)
    assert all(one.membership is None for one in models.values())
    again = forget(kept_run, "hospital-2", command_line=[])
    assert again.models == found.models


def test_where_the_audit_has_a_figure_there_is_one_for_its_patients(kept_run, monkeypatch):
    monkeypatch.setattr(sim.checks.forget, "FEWEST", 2)
    (kept_run.path / MEMBERSHIP).write_text("{}")
    try:
        found = forget(kept_run, "hospital-2", command_line=[]).models
    finally:
        (kept_run.path / MEMBERSHIP).unlink()
    for one in found.values():
        area, low, high = one.membership
        assert 0 <= area <= 1
        assert low <= area <= high
    assert found[REPLAYED].membership == found[NEVER].membership


def test_who_cannot_leave_is_one_line_before_any_replay(kept_run, monkeypatch):
    monkeypatch.setattr("server.replay.Replay.of", None)
    with pytest.raises(UserError, match=r"--hospital west: no hospital of the run; allowed: hosp"):
        forget(kept_run, "west", command_line=[])
    assert not (kept_run.path / "without-west").exists()
