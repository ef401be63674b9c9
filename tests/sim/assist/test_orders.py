"""What the orders say against a drug: counted by hand, and silent where chance explains it."""

import pytest

from common.data.samples import Admission
from sim.assist.orders import BY_CHANCE, UNKNOWN_NAME, Orders


def people(*, women, men, ages=(60,), drugs=(), start=0):
    sexes = ["F"] * women + ["M"] * men
    return [
        Admission(patient=start + n, admission=n, sex=sex, age=ages[n % len(ages)], drugs=drugs)
        for n, sex in enumerate(sexes)
    ]


def test_a_name_that_nobody_ordered_is_marked_and_spelling_does_not_count():
    orders = Orders(people(women=3, men=3, drugs=("Insulin  Glargine",)))
    assert orders.remarks("2000mg Oral Imatinite", sex="F", age=60) == (UNKNOWN_NAME,)
    assert orders.remarks("insulin glargine", sex="F", age=60) == ()


@pytest.mark.parametrize("patients", range(1, 12))
def test_a_sex_that_never_got_a_drug_is_marked_when_chance_hardly_explains_it(patients):
    """Half of all are women: nobody among n by chance has the probability 1/2 to the n."""
    with_it = people(women=0, men=patients, drugs=("Tamsulosin",))
    others = people(women=patients + 20, men=20, start=1000)
    remarks = Orders(with_it + others).remarks("Tamsulosin", sex="F", age=60)
    expected = f"never ordered for women ({patients} patients had it)"
    assert remarks == ((expected,) if 0.5**patients < BY_CHANCE else ())
    assert Orders(with_it + others).remarks("Tamsulosin", sex="M", age=60) == ()


def test_one_order_for_a_patient_like_this_is_enough_to_say_nothing():
    with_it = people(women=1, men=20, drugs=("Tamsulosin",))
    orders = Orders(with_it + people(women=40, men=20, start=1000))
    assert orders.remarks("Tamsulosin", sex="F", age=60) == ()


def test_admissions_of_one_patient_are_no_more_evidence_than_one():
    twelve = [
        Admission(patient=1, admission=n, sex="M", age=60, drugs=("Tamsulosin",)) for n in range(12)
    ]
    orders = Orders(twelve + people(women=13, men=12, start=1000))
    assert orders.remarks("Tamsulosin", sex="F", age=60) == ()


@pytest.mark.parametrize(("age", "word"), [(25, "young"), (60, None), (85, "old")])
def test_an_age_that_never_got_a_drug_is_marked_on_its_side(age, word):
    with_it = people(women=10, men=10, ages=(50, 60, 70), drugs=("Donepezil",))
    others = people(women=20, men=20, ages=(20, 60, 90), start=1000)
    remarks = Orders(with_it + others).remarks("Donepezil", sex="F", age=age)
    expected = f"never ordered for anyone as {word} (20 patients had it)"
    assert remarks == ((expected,) if word else ())


def test_no_age_of_a_patient_is_told():
    with_it = people(women=20, men=20, ages=(50, 61), drugs=("Donepezil",))
    others = people(women=20, men=20, ages=(20,), start=1000)
    (remark,) = Orders(with_it + others).remarks("Donepezil", sex="F", age=22)
    assert not any(age in remark for age in ("50", "61", "20 ", "22"))
