"""The table rows of one invented patient: nothing is drawn here, only counted."""

import zlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple

from common.data.synthetic.catalogue import INTENSIVE_CARE_UNITS, WARDS
from common.data.synthetic.defects import Line, WrittenPatient, WrittenStay

Row = tuple[str, tuple[object, ...]]
"""(table, cells)"""

_PROVIDER = "PSYNTHETIC"
_TRANSFERS = 3
"""Of every stay."""


class Counts(NamedTuple):
    """How much a source holds so far: ids follow from it, spread over their range."""

    stays: int = 0
    orders: int = 0

    def and_(self, stay: WrittenStay) -> "Counts":
        """Return them with one more stay."""
        return Counts(self.stays + 1, self.orders + _orders(stay.lines))


def patient_rows(one: WrittenPatient, index: int, counts: Counts) -> tuple[list[Row], Counts]:
    """Return one patient's rows in all tables, and how much the source holds then.

    Args:
        one: Whom to write.
        index: The patient's number, from 0; the subject_id follows from it.
        counts: What the source holds of earlier patients.
    """
    subject = 10_000_000 + index * 7_368_787 % 9_999_991
    patient, last = one.patient, one.patient.stays[-1]
    about = (subject, patient.sex, patient.anchor_age, patient.anchor_year)
    died = last.discharged.date() if one.died else ""
    rows: list[Row] = [("hosp/patients", (*about, patient.anchor_year_group, died))]
    rows += [("hosp/omr", (subject, *measure)) for measure in one.measures]
    for stay in one.stays:
        rows += _stay_rows(one, stay, subject, counts)
        counts = counts.and_(stay)
    rows += _line_rows((subject, 19_000_000 + index % 900_000), one.orphans, counts)
    return rows, counts._replace(orders=counts.orders + _orders(one.orphans))


def _orders(lines: Sequence[Line]) -> int:
    return max((line.order for line in lines), default=0)


def _stay_rows(
    one: WrittenPatient, written: WrittenStay, subject: int, counts: Counts
) -> Iterator[Row]:
    stay, ids = written.stay, (subject, 20_000_000 + counts.stays * 6_180_339 % 9_999_991)
    dead = one.died and stay is one.patient.stays[-1]
    yield (
        "hosp/admissions",
        (
            *(*ids, stay.admitted, stay.discharged, stay.discharged if dead else ""),
            *(stay.admission_type, _PROVIDER, "EMERGENCY ROOM", "DIED" if dead else "HOME"),
            *(stay.insurance, one.language, "SINGLE", one.race, "", "", int(dead)),
        ),
    )
    yield from _place_rows(ids, written, counts.stays * _TRANSFERS)
    for number, code in written.diagnoses:
        yield "hosp/diagnoses_icd", (*ids, number, code.code, code.version)
    yield from _line_rows(ids, written.lines, counts)


def _place_rows(ids: tuple[int, int], written: WrittenStay, transfers: int) -> Iterator[Row]:
    stay = written.stay
    unit = INTENSIVE_CARE_UNITS[stay.service] if stay.intensive_care else WARDS[stay.service]
    begin, end = stay.admitted, stay.discharged
    half = (begin + (end - begin) / 2).replace(microsecond=0)
    yield "hosp/services", (*ids, begin, "", stay.service)
    if written.to_surgery:
        yield "hosp/services", (*ids, half, stay.service, "SURG")
    moves = (("admit", unit, begin, half), ("transfer", WARDS[stay.service], half, end))
    for number, move in enumerate((*moves, ("discharge", "", end, "")), transfers):
        transfer = 30_000_000 + number * 6_180_339 % 9_999_991
        yield "hosp/transfers", (*ids, transfer, *move)
        if move[0] == "admit" and stay.intensive_care:
            days = (half - begin).total_seconds() / 86_400
            yield "icu/icustays", (*ids, transfer, unit, unit, begin, half, days)


def _line_rows(ids: tuple[int, int], lines: Sequence[Line], counts: Counts) -> Iterator[Row]:
    for order, drug_type, drug, spelling, start in lines:
        pharmacy = 10_000_000 + (counts.orders + order) * 61_803_399 % 89_999_999
        digits = zlib.crc32(drug.name.encode())
        yield (
            "hosp/prescriptions",
            (
                *(*ids, pharmacy, f"{ids[0]}-{order}", order, _PROVIDER),
                *(start, start + timedelta(days=1), drug_type, spelling, drug.formulary),
                *(f"{digits % 80_000:06d}", f"{digits:011d}", drug.strength, ""),
                *(drug.dose, drug.unit, "1", drug.form, "1", drug.route),
            ),
        )
