"""Membership of patients in a trained adapter: seen without privacy, not seen with it."""

import math
from typing import Any

import numpy as np
import pytest
from plain_model import plain_loss
from scipy import integrate, stats

from client.local_update import LocalRound, update
from client.private_update import private_update
from common.configio import from_flat
from common.model.adapter.layout import initial_tensors
from common.privacy.accounting import epsilon
from common.privacy.membership import (
    largest_area,
    membership_findings,
    patient_losses,
    ratios,
    true_positives,
)
from common.privacy.settings import plan_of
from common.training.hospital_data import HospitalData
from common.training.optimiser import TrainState
from sim.checks.audit_loop import made_up

KEYS: dict[str, Any] = {
    "model.backbone": "tiny",
    "train.optimizer": "adamw",
    "train.learning-rate": 0.03,
    "train.batch-size": 16,
    "federation.rounds": 1,
    "federation.local-steps": 60,
    "privacy.delta": 1e-3,
    "privacy.sampling-rate": 0.25,
}


def planted(open_tiny: Any, folder: Any, **keys: Any) -> tuple[Any, Any, Any]:
    """Train on 40 planted patients, and return ratios of these and of 200 others, and the plan."""
    session = open_tiny(rank=8)
    units = [unit for unit in range(240) for _ in range(1 + unit % 2)]
    records = made_up(session, [9] * len(units), units, number=7)
    inside = tuple(record for record in records if record.unit < 40)
    outside = [record for record in records if record.unit >= 40]
    hospital = HospitalData(name="h", train=inside, validation=())
    config, adapter = from_flat({**KEYS, **keys}), session.adapter
    start = initial_tensors(adapter.shapes, adapter.spec)
    private = "privacy.noise-multiplier" in keys
    task = LocalRound(session, hospital, start, TrainState(), config, 1)
    b = (private_update(task, folder) if private else update(task)).b
    losses = [patient_losses(session, list(some), [b, start])[0] for some in (inside, outside)]
    assert [len(one) for one in losses] == [40, 200]
    return ratios(losses[0]), ratios(losses[1]), plan_of(config) if private else None


@pytest.mark.slow
def test_planted_patients_stand_out_without_privacy(open_tiny, tmp_path) -> None:
    members, others, _ = planted(open_tiny, tmp_path)
    area, first, second = membership_findings(
        members, others, epsilon=math.inf, delta=0.0, references=1
    )
    assert area.figure >= 0.9
    assert area.interval is not None
    assert area.interval[0] > 0.5
    assert "no protection was claimed" in area.verdict
    assert first.figure > 0.3
    assert "not resolved: 200 others" in second.verdict
    # the same adapter under a claim that it refutes
    false_claim, *_ = membership_findings(members, others, epsilon=0.5, delta=0.0, references=1)
    assert not false_claim.passed
    assert false_claim.verdict == "the claim is refuted"


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "least", "most"), [(3.0, 1.5, 3.0), (12.0, 0.2, 1.0)])
def test_planted_patients_stay_within_what_epsilon_allows(
    open_tiny, tmp_path, sigma, least, most
) -> None:
    """Oracle: no attack beats the sum of all releases along a patient's own gradient.

    Its area is Phi(d / sqrt 2) with d = q sqrt(T) / sigma: 0.68 at epsilon 2, 0.55 at 0.4. The
    bounds are five standard deviations, which chance passes less than once in a million runs.
    """
    members, others, plan = planted(open_tiny, tmp_path, **{"privacy.noise-multiplier": sigma})
    cost = epsilon(plan).value
    assert least < cost < most
    area, *_ = membership_findings(members, others, epsilon=cost, delta=plan.delta, references=1)
    assert area.passed
    assert area.interval is not None
    deviation = (area.interval[1] - area.figure) / 1.96
    reach = plan.sampling_rate * math.sqrt(plan.steps) / sigma
    best = float(stats.norm.cdf(reach / math.sqrt(2)))
    assert 0.5 - 5 * deviation < area.figure < best + 5 * deviation


def test_losses_are_those_of_transformers(open_tiny) -> None:
    session = open_tiny()
    records = made_up(session, [9, 5, 7], [3, 1, 3], number=1)
    found, patients = patient_losses(session, list(records), [session.adapter.state()])
    assert patients.tolist() == [1, 3]
    single = [plain_loss(session, record).item() for record in records]
    np.testing.assert_allclose(found[:, 0], [single[1], (single[0] + single[2]) / 2], rtol=1e-5)


def test_several_references_are_averaged_as_likelihoods() -> None:
    losses = np.array([[0.5, 1.0, 3.0]])
    expected = -0.5 - math.log((math.exp(-1.0) + math.exp(-3.0)) / 2)
    assert ratios(losses)[0] == pytest.approx(expected)


@pytest.mark.parametrize("cost", [0.5, 3.0])
def test_the_largest_area_is_that_of_randomised_response(cost) -> None:
    """Oracle: the ROC of randomised response, the worst pure mechanism, by its three corners."""
    low = 1 / (1 + math.exp(cost))
    area = integrate.trapezoid([0, 1 - low, 1], [0, low, 1])
    assert largest_area(cost, 0.0) == pytest.approx(area)
    assert largest_area(cost, 0.01) == pytest.approx(area + 0.01)


def test_true_positives_of_two_normals() -> None:
    rng = np.random.default_rng(0)
    found = true_positives(rng.normal(2, 1, 200_000), rng.normal(0, 1, 200_000), 0.01)
    assert found == pytest.approx(stats.norm.sf(stats.norm.isf(0.01) - 2), abs=0.01)
