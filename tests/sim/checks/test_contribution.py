"""``fedrx contribution``: its values against models averaged by hand; no patient in its words."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.data.dataset import open_hospitals
from common.errors import UserError
from common.privacy.membership import patient_losses
from common.rundir import RunDirectory
from common.text.batches import encode
from common.training.worker import Worker
from server.kept_updates import read
from sim.checks.contribution import CONTRIBUTION, contribution
from sim.cli.main import app


def value_of(run: RunDirectory, hospitals: tuple[str, ...]) -> float:
    """Minus the loss of the weighted mean of what these sent in the only round, by numpy."""
    config, kept = run.config(), [one for one in read(run, 1) if one.hospital in hospitals]
    b = run.load_checkpoint("round-00000").b
    if kept:
        total = sum(one.weight for one in kept)
        b = {k: sum(one.weight / total * one.b[k] for one in kept).astype(np.float32) for k in b}
    session = Worker().session(config)
    records = [
        encode(one, session.tokenizer, text=config.text, max_length_tokens=config.train.max_length)
        for hospital in open_hospitals(config).hospitals
        for one in hospital.test
    ]
    return -float(patient_losses(session, records, [b])[0].mean())


def test_shares_are_those_of_averages_by_hand(kept_run):
    found = contribution(kept_run)
    names = tuple(one.name for one in found.hospitals)
    value = {
        some: value_of(kept_run, some)
        for size in range(4)
        for some in itertools.combinations(names, size)
    }
    by_hand = {", ".join(some) or "–": one for some, one in value.items()}
    assert found.subsets == pytest.approx(by_hand, abs=1e-5)
    for one in found.hospitals:
        gains = []
        for order in itertools.permutations(names):
            before = tuple(sorted(order[: order.index(one.name)]))
            gains.append(value[tuple(sorted((*before, one.name)))] - value[before])
        assert one.value == pytest.approx(math.fsum(gains) / len(gains), abs=1e-5)
        assert one.low <= one.value <= one.high
    total = sum(one.value for one in found.hospitals)
    assert total == pytest.approx(found.everybody - found.nobody, abs=1e-9)
    assert json.loads((kept_run.path / CONTRIBUTION).read_text()) == found.as_json()


def test_no_patient_is_in_what_is_written(kept_run):
    contribution(kept_run)
    text = "".join((kept_run.path / name).read_text() for name in (CONTRIBUTION, "contribution.md"))
    data = open_hospitals(kept_run.config())
    patients = {str(one.patient) for each in data.hospitals for one in each.admissions}
    assert not patients & set(text.replace(",", " ").replace(".", " ").split())
    assert "Exact Shapley values" in text


def test_values_may_be_f1(kept_run):
    """That of all hospitals is the run's own F1 on the same admissions."""
    found = contribution(kept_run, metric="f1")
    assert found.everybody == pytest.approx(kept_run.summary().metrics["fedrx"].f1)
    assert found.nobody == pytest.approx(kept_run.summary().metrics["untrained"].f1)


def test_what_cannot_be_valued_is_one_line(kept_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--metric recall; allowed: loss \| f1"):
        contribution(kept_run, metric="recall")
    copy = RunDirectory(Path(shutil.copytree(kept_run.path, tmp_path / "copy")))
    monkeypatch.setattr("sim.checks.contribution.MOST_PLAYERS", 2)
    with pytest.raises(UserError, match="3 hospitals, and 8 subsets"):
        contribution(copy)


def test_the_verb_prints_json(kept_run):
    result = CliRunner().invoke(app, ["contribution", str(kept_run.path), "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["hospitals"]) == 3
