"""What a prompt shows of a sample, and what is left out of it when it is too long.

Items are kept in the order of ``_KEPT_FIRST``, and earlier visits last, the latest of them first:
the oldest visit is the first to go.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from common.data.samples import Admission

_KEPT_FIRST = ("diagnoses", "ordered", "labs", "procedures")


class LeftOut(NamedTuple):
    """Whole items that a prompt does not show for ``train.max-length``."""

    diagnoses: int = 0
    ordered: int = 0
    labs: int = 0
    procedures: int = 0
    visits: int = 0

    def beyond_diagnoses(self) -> dict[str, int]:
        """Return what other protocols than ``admission`` leave out, by kind; none without any."""
        counts = self._asdict()
        del counts["diagnoses"]
        return {kind: number for kind, number in counts.items() if number}


NOTHING = LeftOut()
"""All is shown."""


def together(parts: Iterable[LeftOut]) -> LeftOut:
    """Return the sums.

    >>> together([LeftOut(visits=2), LeftOut(visits=1, labs=3)]).beyond_diagnoses()
    {'labs': 3, 'visits': 3}
    """
    return LeftOut(*map(sum, zip(NOTHING, *parts, strict=True)))


def items(admission: "Admission") -> int:
    """Return how many items a prompt can show: a visit is one."""
    return sum(len(getattr(admission, kind)) for kind in _KEPT_FIRST) + len(admission.earlier)


def with_items(admission: "Admission", number: int) -> tuple["Admission", LeftOut]:
    """Return the admission with so many items alone, and what it lacks then.

    >>> from common.data.samples import Admission, Visit
    >>> one = Admission(patient=1, admission=1, sex="F", age=50, diagnoses=("a", "b"),
    ...     earlier=(Visit(drugs=("old",)), Visit(drugs=("new",))))
    >>> shown, left_out = with_items(one, 3)
    >>> shown.diagnoses, [visit.drugs for visit in shown.earlier], left_out.visits
    (('a', 'b'), [('new',)], 1)
    """
    left, kept, lacking = number, {}, {}
    for kind in _KEPT_FIRST:
        found = getattr(admission, kind)
        kept[kind] = found[:left]
        lacking[kind] = len(found) - len(kept[kind])
        left -= len(kept[kind])
    past = admission.earlier[max(0, len(admission.earlier) - left) :]
    visits = len(admission.earlier) - len(past)
    return replace(admission, earlier=past, **kept), LeftOut(visits=visits, **lacking)
