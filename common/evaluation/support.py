"""How often a suggested drug was ordered in similar admissions of the training hospitals.

It says what was done, not what is right, and it is no part of the model's answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.names import normalise_string
from common.data.samples import Admission
from common.evaluation.baselines import largest, presence

NEIGHBOURS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Orders of one drug among similar admissions."""

    ordered: int
    similar: int
    """Admissions that count as similar."""


class SupportIndex:
    """Similar training admissions by their coded diagnoses.

    Args:
        train: Training splits of the hospitals whose data is at hand; held-out patients are not in
            it.
    """

    def __init__(self, train: Sequence[Admission]) -> None:
        codes = [frozenset(map(category, one.diagnosis_codes)) for one in train]
        self._column = {code: place for place, code in enumerate(sorted(frozenset().union(*codes)))}
        self._codes_nc = presence(codes, self._column)
        self._sizes_n = np.array([len(one) for one in codes])
        self._drugs = [frozenset(map(normalise_string, one.drugs)) for one in train]

    def similar(self, codes: Sequence[str]) -> list[int]:
        """Return the places of the most similar admissions, at most ``NEIGHBOURS``.

        Similarity is the Jaccard index of the sets of code categories; who shares none is not
        similar. Ties go to the earlier admission.
        """
        asked = frozenset(category(code) for code in codes if code)
        shared_n = (presence([asked], self._column) @ self._codes_nc.T).toarray()[0]
        number = min(NEIGHBOURS, int(np.count_nonzero(shared_n)))
        if not number:
            return []
        index_n = shared_n / (self._sizes_n + len(asked) - shared_n)
        near = largest(index_n, number).tolist()
        return sorted(near, key=lambda place: (-index_n[place], place))

    def support(self, codes: Sequence[str], drugs: Sequence[str]) -> list[Support | None]:
        """Return the support of each drug; None for all where no admission is similar.

        Args:
            codes: ``version:code`` of the diagnoses; free text has none, and does not count.
            drugs: Names, compared at the string level.
        """
        near = self.similar(codes)
        if not near:
            return [None] * len(drugs)
        return [
            Support(
                ordered=sum(normalise_string(drug) in self._drugs[place] for place in near),
                similar=len(near),
            )
            for drug in drugs
        ]


def category(code: str) -> str:
    """Return the category of a code: what stands before the dot; of what is no ICD, all of it.

    >>> category("10:E119"), category("9:4019"), category("9:E8788")
    ('10:E11', '9:401', '9:E878')
    """
    version, _, digits = code.partition(":")
    if version not in ("9", "10"):
        return code
    return f"{version}:{digits[: 4 if version == '9' and digits.startswith('E') else 3]}"
