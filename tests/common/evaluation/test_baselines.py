"""The baselines against hand counts, scikit-learn, and the demo's known figures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import GroupKFold, KFold
from sklearn.preprocessing import MultiLabelBinarizer

from common.config import DataConfig
from common.data.prepare import load_samples
from common.data.samples import Admission
from common.evaluation.baselines import (
    BASELINES,
    Ranked,
    logistic_regression,
    nearest_neighbours,
    popularity,
)
from common.evaluation.metrics import Metrics, score


def admission(codes: str, drugs: Sequence[str], patient: int = 0) -> Admission:
    return Admission(
        patient=patient,
        admission=0,
        sex="F",
        age=60,
        diagnoses=tuple(codes),
        diagnosis_codes=tuple(f"10:{code}" for code in codes),
        drugs=tuple(drugs),
    )


def random_admissions(seed: int, number: int) -> list[Admission]:
    """Codes A..L imply the drugs of the same letter, with noise."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        codes = draw.choice(list("ABCDEFGHIJKL"), draw.integers(1, 7), replace=False)
        drugs = [c.lower() for c in codes if draw.random() < 0.85]
        drugs += [c for c in "xyz" if draw.random() < 0.5] or ["x"]
        found.append(admission("".join(codes), drugs))
    return found


def listed(found: Sequence[Ranked]) -> list[tuple[str, ...]]:
    return [one.listed for one in found]


def test_popularity_by_hand() -> None:
    train = [admission("A", ["x", "y"]), admission("A", ["x", "z"]), admission("B", ["X", "y"])]
    test = [admission("Q", ["q"])] * 2
    assert [one.drugs for one in popularity(train, test)] == [("x", "y", "z")] * 2
    # Mean Jaccard on train: k=1 (1/2 + 1/2 + 1/2)/3; k=2 (1 + 1/3 + 1)/3; k=3 (2/3 * 3)/3.
    assert listed(popularity(train, test)) == [("x", "y"), ("x", "y")]


@pytest.mark.parametrize("seed", range(3))
def test_popularitys_length_is_the_best_on_train(seed: int) -> None:
    train = random_admissions(seed, 60)
    counts = {d: sum(d in a.drugs for a in train) for a in train for d in a.drugs}
    ranked = sorted(counts, key=lambda drug: (-counts[drug], drug))
    jaccard = [
        np.mean([len(set(top) & set(a.drugs)) / len(set(top) | set(a.drugs)) for a in train])
        for top in (ranked[:k] for k in range(1, len(ranked) + 1))
    ]
    assert listed(popularity(train, train[:1])) == [tuple(ranked[: 1 + int(np.argmax(jaccard))])]


def test_spellings_are_one_drug_shown_in_the_commonest() -> None:
    train = [
        admission("A", ["HEPARIN "]),
        admission("A", ["Heparin"]),
        admission("B", ["Heparin", "b"]),
        admission("B", ["b"]),
    ]
    assert popularity(train, train[:1])[0].drugs[0] == "Heparin"


def test_neighbours_by_hand() -> None:
    train = [
        admission("AB", ["a", "b"]),
        admission("ABCDEFGH", ["far"]),
        admission("C", ["c", "d", "e"]),
        admission("A", ["a"]),
    ]
    # To AB: 1, 1/2, 0, 1/sqrt 2. Of two: a 1.71, b 1; length (2 * 1 + 1 * 0.71) / 1.71 = 1.6 -> 2.
    assert listed(nearest_neighbours(train, [admission("AB", [])], neighbours=2)) == [("a", "b")]
    # To AC: 1/2, 1/2, 0.71, 0.71. Of three, in order of votes: a 1.21, then c, d, e 0.71 and b 1/2;
    # length (2 * 0.5 + 3 * 0.71 + 1 * 0.71) / 1.91 = 2.
    assert listed(nearest_neighbours(train, [admission("AC", [])], neighbours=3)) == [("a", "c")]
    # No shared code: everybody votes alike; mean length 7/4 -> 2.
    assert listed(nearest_neighbours(train, [admission("Z", [])], neighbours=2)) == [("a", "b")]


def test_neighbours_are_scikit_learns() -> None:
    train, test = random_admissions(1, 80), random_admissions(2, 30)
    codes = MultiLabelBinarizer().fit([a.diagnosis_codes for a in train])
    x, asked = (codes.transform([a.diagnosis_codes for a in split]) for split in (train, test))
    # Rounded, so that equal similarities tie in both; then the earlier admission comes first.
    similarity = np.round(cosine_similarity(asked, x), 9)
    found = nearest_neighbours(train, test, neighbours=7)
    for row, drugs in zip(similarity, listed(found), strict=True):
        nearest = np.argsort(-row, kind="stable")[:7]
        votes: dict[str, float] = {}
        for n in nearest:
            for drug in train[n].drugs:
                votes[drug] = votes.get(drug, 0) + row[n]
        ranked = sorted(votes, key=lambda drug: (-round(votes[drug], 6), drug))
        length = sum(row[n] * len(train[n].drugs) for n in nearest) / row[nearest].sum()
        assert drugs == tuple(ranked[: round(length)])


def test_regression_is_one_scikit_learn_model_a_drug() -> None:
    train, test = random_admissions(3, 120), random_admissions(4, 20)
    codes = MultiLabelBinarizer().fit([a.diagnosis_codes for a in train])
    names = sorted({drug for a in train for drug in a.drugs})
    x, asked = (codes.transform([a.diagnosis_codes for a in split]) for split in (train, test))
    probable = np.stack(
        [
            LogisticRegression(C=0.1, max_iter=500)
            .fit(x, [name in a.drugs for a in train])
            .predict_proba(asked)[:, 1]
            for name in names
        ]
    )
    length = round(np.mean([len(a.drugs) for a in train]))
    for column, found in enumerate(logistic_regression(train, test)):
        best = sorted(range(len(names)), key=lambda n: -probable[n, column])
        assert set(found.listed) == {names[n] for n in best[:length]}
        # The whole ranking, up to ties.
        places = [names.index(drug) for drug in found.drugs]
        assert sorted(places) == list(range(len(names)))
        assert np.diff(probable[places, column]).max() < 1e-3


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=list(BASELINES))
def test_no_baseline_sees_the_tests_drugs_or_anything_but_its_codes(baseline) -> None:
    train, test = random_admissions(5, 60), random_admissions(6, 9)
    blind = [
        replace(a, drugs=("never seen",), age=99, sex="M", diagnoses=(), patient=n, service="X")
        for n, a in enumerate(test)
    ]
    found = baseline(train, test)
    assert len(found) == len(test)
    assert baseline(train, blind) == found
    # Each answer depends on its own codes only, not on who else is asked.
    assert [baseline(train, [one])[0] for one in test] == found


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=list(BASELINES))
def test_empty_splits(baseline) -> None:
    train = random_admissions(7, 6)
    assert baseline(train, []) == []
    with pytest.raises(ValueError, match="no admissions"):
        baseline([], train)
    # Codes, and whole admissions, that training never saw.
    assert all(listed(baseline(train, [admission("Z", ["q"]), admission("", ["q"])])))


Baseline = Callable[[Sequence[Admission], Sequence[Admission]], list[Ranked]]


def cross_validated(admissions: Sequence[Admission], baseline: Baseline, folds=None) -> Metrics:
    """Five folds by patient (scikit-learn's GroupKFold, not shuffled), string level."""
    patients = [a.patient for a in admissions]
    rows = []
    for train, test in folds or GroupKFold(5).split(patients, groups=patients):
        answers = baseline([admissions[n] for n in train], [admissions[n] for n in test])
        rows += [
            SimpleNamespace(cluster=patients[n], truth=admissions[n].drugs, answer=answer.listed)
            for n, answer in zip(test, answers, strict=True)
        ]
    return score(rows, level="string", vocabulary=(), resamples=0)


def first(drugs: int):
    """Popularity with lists of one length."""
    return lambda train, test: [one._replace(length=drugs) for one in popularity(train, test)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (first(10), (0.625, 0.235, 0.200)),
        (first(30), (0.418, 0.452, 0.266)),
        (nearest_neighbours, (None, None, 0.247)),
        (logistic_regression, (0.437, 0.453, 0.275)),
    ],
    ids=["top-10", "top-30", "10 neighbours", "regression"],
)
def test_figures_of_the_demo(mimic_demo: Path, tmp_path: Path, baseline, expected) -> None:
    config = DataConfig(path=str(mimic_demo), drop_flushes=False)
    metrics = cross_validated(load_samples(config, cache_dir=tmp_path).admissions, baseline)
    for name, figure in zip(("precision", "recall", "jaccard"), expected, strict=True):
        assert figure is None or metrics.value(name) == pytest.approx(figure, abs=0.01), name


def test_splitting_by_admission_would_leak(mimic_demo: Path, tmp_path: Path) -> None:
    """The known trap: .329 in place of .247, because a patient's own other stays are found."""
    config = DataConfig(path=str(mimic_demo), drop_flushes=False)
    admissions = load_samples(config, cache_dir=tmp_path).admissions
    leaked = [
        cross_validated(admissions, nearest_neighbours, folds.split(admissions)).value("jaccard")
        for folds in (KFold(5, shuffle=True, random_state=seed) for seed in range(3))
    ]
    assert np.mean(leaked) == pytest.approx(0.329, abs=0.01)


@pytest.mark.slow
def test_diagnoses_tell_much_about_drugs_in_the_synthetic_source(tmp_path: Path) -> None:
    config = DataConfig(path="synthetic", synthetic_patients=240)
    admissions = load_samples(config, cache_dir=tmp_path).admissions
    popular, regressed = (
        cross_validated(admissions, baseline).value("jaccard")
        for baseline in (popularity, logistic_regression)
    )
    assert regressed >= popular + 0.10
    # Neither trivial nor pure noise.
    assert popular > 0.15
    assert regressed < 0.9
