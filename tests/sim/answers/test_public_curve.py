"""The curve on made-up patients: what it measures, and that it reads and spends nothing."""

import io
from dataclasses import replace

import pytest
import torch
from plain_model import plain_loss

from common.data.dataset import open_hospitals
from common.text.batches import encode
from common.training.worker import Worker
from sim.answers import public_curve as curve
from sim.answers.evaluate import evaluate_run
from sim.cli.terminal import Terminal
from sim.report.run_report import write_report
from sim.report.terminal import summary_parts
from sim.runs.federate import federate

PRIVATE = {
    "privacy__noise_multiplier": 1.0,
    "privacy__sampling_rate": 0.5,
    "federation__rounds": 2,
    "evaluation__samples": 2,
    "evaluation__max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    config = tiny_config(**PRIVATE, run__backend="in-process")
    folder = tmp_path_factory.mktemp("runs") / "run"
    return federate(config, command_line=["fedrx"], run_dir=folder).directory


def asked(run):
    config = run.config()
    return replace(config, evaluation=replace(config.evaluation, public_validation=12))


def test_each_checkpoint_s_loss_on_admissions_of_no_hospital(run, monkeypatch):
    config = asked(run)
    session = Worker().session(config)
    mine = {(one.diagnoses, one.drugs) for h in open_hospitals(config).hospitals for one in h.train}
    read = []
    load = curve.load_samples

    def noted(data):
        read.append((data.path, data.synthetic_seed))
        return load(data)

    monkeypatch.setattr(curve, "load_samples", noted)
    before = session.adapter.flat.clone()
    found = curve.public_curve(run, session, config)
    assert torch.equal(session.adapter.flat, before)
    assert read == [("synthetic", config.data.synthetic_seed + 1)]
    admissions, _ = curve.public_admissions(config)
    assert len(admissions) == found.samples == 12
    assert not {(one.diagnoses, one.drugs) for one in admissions} & mine
    length = config.train.max_length
    samples = [
        encode(one, session.tokenizer, text=config.text, max_length_tokens=length)
        for one in admissions
    ]
    tokens = sum(one.label_tokens for one in samples)
    assert [place for place, _ in found.losses] == [0, 1, 2]
    for name, (_, loss) in zip(run.checkpoint_names(), found.losses, strict=True):
        session.adapter.load(run.load_checkpoint(name).b)
        expected = sum(plain_loss(session, one, "sum").item() for one in samples) / tokens
        assert loss == pytest.approx(expected, rel=1e-5)
    assert found.losses[0] != found.losses[2]


def test_it_asks_what_the_run_asks(run):
    config = asked(run)
    config = replace(config, data=replace(config.data, protocol="first-24h"))
    admissions, _ = curve.public_admissions(config)
    assert {one.protocol for one in admissions} == {"first-24h"}


def test_it_spends_nothing_and_the_report_says_so(run):
    ledgers = [*sorted(run.path.rglob("*ledger*")), run.path / "privacy.jsonl"]
    before = [file.read_bytes() for file in ledgers]
    assert "made-up" not in write_report(run).read_text()
    evaluate_run(run, overrides=["evaluation.public-validation=12"])
    assert [file.read_bytes() for file in ledgers] == before
    assert len(before) > 1
    page = write_report(run).read_text()
    assert "on 12 made-up admissions that no hospital has" in page
    assert "needed no hospital&#39;s data and spent nothing" in page
    told = io.StringIO()
    Terminal(file=told, width=200).say(*summary_parts(run, run.summary()))
    assert "loss on 12 made-up admissions of no hospital" in told.getvalue()
    # Answers made anew without it leave the curve of the same checkpoints.
    evaluate_run(run)
    assert run.summary().public_validation is not None
