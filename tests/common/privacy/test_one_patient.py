"""D and D minus one patient: nobody else's samples change (specification test 8, at the data).

The guarantee holds for one unit's gradients; a setting under which a patient's absence changes
another patient's samples, hospital or place in the training split has to be refused.
"""

from typing import Any

import pytest

from common.configio import from_flat
from common.data.partition import ATTRIBUTES, Hospital, assign_hospitals
from common.data.prepare import load_samples
from common.errors import UserError
from common.privacy.settings import partition_note, plan_of

KEYS: dict[str, Any] = {
    "data.synthetic-patients": 60,
    "federation.hospitals": 3,
    "privacy.noise-multiplier": 1.2,
}
MEDIANS = [{f"data.missing-{name}": "median"} for name in ("height", "weight", "bmi")]
SCHEMES = [{"partition.scheme": scheme} for scheme in ("dirichlet", *ATTRIBUTES)]


def hospitals_of(admissions: Any, **keys: Any) -> tuple[Hospital, ...]:
    config = from_flat({**KEYS, **keys})
    count = config.federation.hospitals
    return assign_hospitals(admissions, config.partition, hospitals=count, data=config.data)


def others_changed(**keys: Any) -> set[int]:
    """Patients whose training samples or hospital change as each of some patients is removed."""
    admissions = load_samples(from_flat(KEYS).data)
    whole = hospitals_of(admissions.admissions, **keys)
    changed = set()
    for gone in sorted({one.patient for h in whole for one in h.train})[::3]:
        kept = [one for one in admissions.admissions if one.patient != gone]
        for before, after in zip(whole, hospitals_of(kept, **keys), strict=True):
            assert before.name == after.name
            stays = {one for one in before.train if one.patient != gone}
            changed |= {one.patient for one in stays ^ set(after.train)}
    return changed


@pytest.mark.parametrize(
    "keys", [{}, {"data.missing-height": "drop"}, {"privacy.max-admissions-per-patient": 1}]
)
def test_without_one_patient_nobody_else_changes(keys) -> None:
    plan_of(from_flat({**KEYS, **keys}))
    assert others_changed(**keys) == set()


@pytest.mark.parametrize("unit", ["patient", "admission"])
@pytest.mark.parametrize("keys", [*MEDIANS, {"data.train-samples": 10}], ids=str)
def test_what_makes_patients_depend_on_each_other_is_refused(keys, unit) -> None:
    (name,) = keys
    with pytest.raises(UserError, match=f"{name}=.* with privacy"):
        plan_of(from_flat({**KEYS, **keys, "privacy.unit": unit}))
    plan_of(from_flat({**KEYS, **keys, "privacy.unit": "hospital"}))  # whole hospitals do not mind


@pytest.mark.parametrize("keys", [*MEDIANS, {"data.train-samples": 10}, *SCHEMES], ids=str)
def test_the_refusals_are_needed(keys) -> None:
    """Each of them does change others, with three hospitals or with eight."""
    many = {**keys, "federation.hospitals": 8}
    assert others_changed(**keys) or others_changed(**many)


@pytest.mark.parametrize("keys", SCHEMES, ids=str)
def test_a_partition_that_depends_on_patients_is_said_to_be_outside(keys) -> None:
    config = from_flat({**KEYS, **keys})
    plan_of(config)
    assert "the dealing itself is outside" in partition_note(config)
    assert not partition_note(from_flat(KEYS))
    assert not partition_note(from_flat({**KEYS, **keys, "federation.hospitals": 1}))
    assert not partition_note(from_flat({**KEYS, **keys, "privacy.unit": "hospital"}))
