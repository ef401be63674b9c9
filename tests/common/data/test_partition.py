"""Splits and hospitals: by patient, stable, complete, for every scheme."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import DataConfig, PartitionConfig
from common.data.partition import ATTRIBUTES, SPLITS, assign_hospitals, split_of
from common.data.samples import Admission
from common.errors import UserError

SCHEMES = ("iid", "dirichlet", *ATTRIBUTES)


def admission(patient, number=0, **fields):
    return Admission(patient=patient, admission=100 * patient + number, sex="F", age=50, **fields)


def population(patients, values=4):
    """One to three admissions each; the attribute of the first decides, later ones differ."""
    return [
        admission(
            patient,
            number,
            **dict.fromkeys(ATTRIBUTES.values(), f"value-{(patient + number) % values}"),
        )
        for patient in range(1, patients + 1)
        for number in range(1 + patient % 3)
    ]


def deal(admissions, scheme="iid", hospitals=3, data=None, **partition):
    config = PartitionConfig(scheme=scheme, **partition)
    return assign_hospitals(admissions, config, hospitals=hospitals, data=data or DataConfig())


def homes(hospitals):
    return {one.patient: h.name for h in hospitals for one in h.admissions}


def splits(hospitals):
    return {one.patient: s for h in hospitals for s in SPLITS for one in getattr(h, s)}


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    hospitals=st.integers(1, 4),
    seed=st.integers(0, 10),
    patients=st.integers(80, 140),
)
def test_everyone_is_dealt_once(scheme, hospitals, seed, patients):
    admissions = population(patients)
    dealt = deal(admissions, scheme, hospitals, DataConfig(split_seed=seed), seed=seed, alpha=5.0)
    places = Counter(
        (one.patient, h.name, split) for h in dealt for split in SPLITS for one in getattr(h, split)
    )
    assert len(places) == patients
    assert sum(places.values()) == len(admissions)
    assert [h.name for h in dealt] == [f"hospital-{n + 1}" for n in range(hospitals)]
    assert sum(h.patients for h in dealt) == patients
    again = deal(admissions, scheme, hospitals, DataConfig(split_seed=seed), seed=seed, alpha=5.0)
    assert again == dealt


def test_adding_patients_moves_no_other():
    few, many = population(90), population(150)
    for read in (homes, splits):
        before, after = read(deal(few)), read(deal(many))
        assert before == {patient: after[patient] for patient in before}
    # The order of the table does not matter either.
    assert homes(deal(few)) == homes(deal(few[::-1]))


def test_seeds_deal_anew():
    admissions = population(120)
    assert homes(deal(admissions)) != homes(deal(admissions, seed=1))
    assert splits(deal(admissions)) == splits(deal(admissions, seed=1))
    assert splits(deal(admissions)) != splits(deal(admissions, data=DataConfig(split_seed=1)))


def test_split_shares_are_those_asked_for():
    found = Counter(
        split_of(patient, seed=3, validation_fraction=0.1, test_fraction=0.2)
        for patient in range(20_000)
    )
    assert found["test"] / 20_000 == pytest.approx(0.2, abs=0.01)
    assert found["validation"] / 20_000 == pytest.approx(0.1, abs=0.01)


def test_split_and_hospital_are_independent():
    both = Counter()
    dealt = deal(population(3000), hospitals=2)
    for hospital in dealt:
        patients = {one.patient for one in hospital.admissions}
        both[hospital.name] = len({one.patient for one in hospital.test}) / len(patients)
    assert all(share == pytest.approx(0.2, abs=0.03) for share in both.values())


@pytest.mark.parametrize("scheme", sorted(ATTRIBUTES))
def test_attribute_groups_stay_together_by_the_first_admission(scheme):
    admissions = population(120, values=5)
    first = {}
    for one in admissions:
        first.setdefault(one.patient, getattr(one, ATTRIBUTES[scheme]))
    home = homes(deal(admissions, scheme, hospitals=3))
    for value in set(first.values()):
        assert len({home[p] for p in first if first[p] == value}) == 1
    assert set(Counter(home.values()).values()) == {24, 48}


def test_fewer_groups_than_hospitals_halves_the_largest():
    admissions = population(90, values=2)
    dealt = deal(admissions, "service", hospitals=3)
    first = {one.patient: one.service for one in reversed(admissions)}
    kinds = [{first[one.patient] for one in hospital.admissions} for hospital in dealt]
    assert sorted(map(len, kinds)) == [1, 1, 1]
    assert sorted(hospital.patients for hospital in dealt) == [22, 23, 45]


def test_dirichlet_skews_less_with_a_larger_alpha():
    def spread(alpha):
        dealt = deal(population(600), "dirichlet", 3, alpha=alpha)
        shares = []
        for hospital in dealt:
            services = Counter(one.service for one in hospital.admissions)
            shares.append(max(services.values()) / hospital.samples)
        return sum(shares)

    assert spread(0.1) > spread(100.0) + 0.3


def test_dirichlet_redraws_for_the_smallest_size():
    dealt = deal(population(200), "dirichlet", 4, alpha=0.3, min_patients=20)
    assert min(hospital.patients for hospital in dealt) >= 20
    loose = deal(population(200), "dirichlet", 4, alpha=0.3)
    assert min(hospital.patients for hospital in loose) < 20
    with pytest.raises(UserError, match=r"partition\.alpha"):
        deal(population(20), "dirichlet", 4, alpha=0.5, min_patients=10)


def test_one_hospital_has_everything():
    for scheme in SCHEMES:
        (only,) = deal(population(50), scheme, hospitals=1)
        assert only.name == "hospital-1"
        assert only.patients == 50


def test_names_sort_in_their_order():
    names = [hospital.name for hospital in deal(population(600), hospitals=12)]
    assert names[0] == "hospital-01"
    assert names == sorted(names)


def test_an_empty_hospital_is_one_clear_line():
    with pytest.raises(UserError, match=r"hospital-\d with 0 of 2 patients"):
        deal(population(2), hospitals=3)
    with pytest.raises(UserError, match="without training samples"):
        deal(population(60), data=DataConfig(test_fraction=0.5, validation_fraction=0.5))
    with pytest.raises(UserError, match=r"federation\.hospitals=3 for 2 patients"):
        deal(population(2), "service", hospitals=3)
    with pytest.raises(UserError, match=r"min-patients=50"):
        deal(population(90), min_patients=50)


def test_medians_come_from_the_hospitals_own_training_split():
    admissions = [
        dataclasses.replace(one, height_cm=None if one.patient % 2 else 100.0 + one.patient)
        for one in population(200)
    ]
    plain = deal(admissions, hospitals=2)
    filled = deal(admissions, hospitals=2, data=DataConfig(missing_height="median"))
    for before, after in zip(plain, filled, strict=True):
        known = sorted(one.height_cm for one in before.train if one.height_cm is not None)
        middle = len(known) // 2
        median = known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2
        for split in SPLITS:
            for old, new in zip(getattr(before, split), getattr(after, split), strict=True):
                expected = old.height_cm if old.height_cm is not None else round(median, 1)
                assert new == dataclasses.replace(old, height_cm=expected)


def test_drop_leaves_out_and_counts():
    admissions = [
        dataclasses.replace(
            one, weight_kg=None if one.patient % 4 == 0 else 70.0, bmi=None if one.age else 1.0
        )
        for one in population(100)
    ]
    data = DataConfig(missing_weight="drop")
    dealt = deal(admissions, hospitals=2, data=data)
    dropped = sum(hospital.dropped["missing_weight_kg"] for hospital in dealt)
    assert dropped == sum(one.weight_kg is None for one in admissions) > 0
    assert sum(hospital.samples for hospital in dealt) == len(admissions) - dropped
    assert all(one.weight_kg == 70.0 for hospital in dealt for one in hospital.admissions)


def test_a_median_of_nothing_stays_unknown():
    dealt = deal(population(60), data=DataConfig(missing_bmi="median"))
    assert all(one.bmi is None for hospital in dealt for one in hospital.admissions)
