"""The matrix, gains, the worst hospital and the curve, against means by hand."""

import numpy as np
import pytest

from common.evaluation.metrics import interval_of_mean
from common.evaluation.transfer import Results, Trained, measured

NAMES = ("a", "b", "c")
AT = ("a", "a", "b", "b", "c")
PATIENTS = (1, 1, 2, 3, 4)
MODELS = [("a",), ("b",), ("c",), NAMES, ("b", "c"), ("a", "c"), ("a", "b")]


@pytest.fixture(scope="module")
def results() -> Results:
    values = np.random.default_rng(0).uniform(size=(2 * len(MODELS), len(AT)))
    return Results(
        models=[Trained(some, seed) for seed in (0, 1) for some in MODELS],
        values_RN=values,
        patients_N=PATIENTS,
        hospitals_N=AT,
        higher_is_better=True,
        resamples=200,
        seed=0,
    )


def rows(results: Results, some: tuple[str, ...]) -> np.ndarray:
    """Both seeds of a model."""
    place = MODELS.index(some)
    return results.values_RN[[place, place + len(MODELS)]]


def test_matrix_gains_and_worst_are_means_of_the_right_cells(results):
    found = measured(results, NAMES)
    for name in NAMES:
        at = [place for place, one in enumerate(AT) if one == name]
        for trained, some in {**{n: (n,) for n in NAMES}, "all": NAMES}.items():
            by_hand = rows(results, some)[:, at].mean()
            assert found.matrix[trained][name].value == pytest.approx(by_hand)
        one = next(one for one in found.hospitals if one.hospital == name)
        together, alone = (rows(results, some)[:, at].mean(0) for some in (NAMES, (name,)))
        absent = rows(results, tuple(n for n in NAMES if n != name))[:, at].mean(0)
        assert one.gain.value == pytest.approx((together - alone).mean())
        assert one.presence.value == pytest.approx((together - absent).mean())
        assert one.patients == len({PATIENTS[place] for place in at})
    least = min(NAMES, key=lambda name: found.matrix["all"][name].value)
    (worst,) = (one for one in found.worst if one.kind == "together")
    assert (worst.hospital, worst.value) == (least, found.matrix["all"][least])


def test_intervals_are_over_patients_and_over_seeds(results):
    """The bootstrap sees each patient once, as a mean over seeds; Student's t sees the seeds."""
    told = measured(results, NAMES).matrix["all"]["b"]
    both = rows(results, NAMES)[:, 2:4]
    expected = interval_of_mean(both.mean(0).tolist(), [2, 3], resamples=200, seed=0)
    assert (told.low, told.high) == (expected.low, expected.high)
    spread = 12.7062 * both.mean(1).std(ddof=1) / 2**0.5
    assert told.over_seeds == pytest.approx(spread, rel=1e-4)
    assert measured(results, NAMES).matrix["all"]["a"].low is None  # one patient


def test_of_a_loss_less_is_better(results):
    loss = Results(**{**vars(results), "higher_is_better": False})
    ours, theirs = measured(results, NAMES), measured(loss, NAMES)
    for one, other in zip(ours.hospitals, theirs.hospitals, strict=True):
        assert other.gain.value == pytest.approx(-one.gain.value)
    greatest = max(NAMES, key=lambda name: theirs.matrix["all"][name].value)
    assert [one.hospital for one in theirs.worst if one.kind == "together"] == [greatest]


def test_the_curve_tells_those_who_were_there_from_those_who_were_not(results):
    one, two, three = measured(results, NAMES).curve
    assert [(size.hospitals, size.models) for size in (one, two, three)] == [(1, 6), (2, 6), (3, 2)]
    assert three.outside is None
    assert three.everybody == three.inside
    by_patient = [
        np.concatenate([rows(results, some)[:, place] for some in MODELS[:3] if at in some]).mean()
        for place, at in enumerate(AT)
    ]
    assert one.inside.value == pytest.approx(np.mean(by_patient))
    outside = [
        np.concatenate([rows(results, some)[:, place] for some in MODELS[4:] if at not in some])
        for place, at in enumerate(AT)
    ]
    assert two.outside.value == pytest.approx(np.mean([one.mean() for one in outside]))


def test_a_hospital_that_holds_nobody_out_has_no_figures(results):
    without_c = {"patients_N": PATIENTS[:4], "hospitals_N": AT[:4]}
    values = {"values_RN": results.values_RN[:, :4]}
    found = measured(Results(**{**vars(results), **without_c, **values}), NAMES)
    assert found.matrix["all"]["c"] is None
    assert found.hospitals[-1].gain is None
    assert found.hospitals[-1].patients == 0
    assert {one.hospital for one in found.worst} <= {"a", "b"}
