"""What the training splits' orders say against a suggested drug for one patient.

Only what the data itself shows: a name that nobody ordered, and a drug that many patients got but
nobody of the patient's sex or age. It is no rule of medicine, and its silence means nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

from common.data.names import normalise_string
from common.data.samples import Admission

UNKNOWN_NAME = "in no order of the data"
BY_CHANCE = 0.01
"""Largest probability, by the data's own shares, that nobody of a kind is among the patients."""
_WOMEN_OR_MEN = {"F": "women", "M": "men"}


class Orders:
    """Who got which drug.

    Args:
        train: Training splits of the hospitals whose data is at hand.
    """

    def __init__(self, train: Sequence[Admission]) -> None:
        self._people = {one.patient: one for one in train}
        self._with: dict[str, set[int]] = defaultdict(set)
        for one in train:
            for drug in one.drugs:
                self._with[normalise_string(drug)].add(one.patient)

    def remarks(self, drug: str, *, sex: str, age: int) -> tuple[str, ...]:
        """Say what speaks against a drug; nothing does for most.

        Args:
            drug: Its name, compared at the string level.
            sex: ``F`` or ``M``.
            age: Years.
        """
        patients = self._with.get(normalise_string(drug))
        if not patients:
            return (UNKNOWN_NAME,)
        kinds: dict[str, Callable[[Admission], bool]] = {
            f"for {_WOMEN_OR_MEN[sex]}": lambda one: one.sex == sex,
            "for anyone as young": lambda one: one.age <= age,
            "for anyone as old": lambda one: one.age >= age,
        }
        return tuple(
            f"never ordered {kind} ({len(patients)} patients had it)"
            for kind, belongs in kinds.items()
            if self._never(patients, belongs)
        )

    def _never(self, patients: set[int], belongs: Callable[[Admission], bool]) -> bool:
        """Tell whether nobody of a kind is among the patients, where chance hardly explains it."""
        if any(belongs(self._people[patient]) for patient in patients):
            return False
        share = sum(map(belongs, self._people.values())) / len(self._people)
        return (1 - share) ** len(patients) < BY_CHANCE
