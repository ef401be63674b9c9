"""The table rows of one invented patient, with the defects planted in them."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import count
from typing import NamedTuple

import numpy as np

from common.data.synthetic.catalogue import (
    ADDITIVES,
    FLUSHES,
    INTENSIVE_CARE_UNITS,
    VEHICLES,
    WARDS,
    Drug,
)
from common.data.synthetic.patients import HIDDEN_OLD_AGE, Order, Patient, Stay
from common.seeds import stream

Row = tuple[str, tuple[object, ...]]
"""(table, cells)"""

_PROVIDER = "PSYNTHETIC"
_RACES = ("WHITE", "WHITE", "WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "UNKNOWN")
_BMI_FACTOR = 703.07
_MINUTES_A_DAY = 1440

# Shares of planted defects.
_NO_ORDERS = 0.03
_NO_DIAGNOSES = 0.01
_ONLY_FLUSHES = 0.01
_DUPLICATE = 0.01
_REPEAT = 0.25
_VARIANT_OF_REPEATS = 0.06
_ORPHAN = 0.02
# Patients who carry the single defects, so that the smallest source has them too.
_OUTLIERS = {
    0: (("Height (Inches)", "5"), ("BMI (kg/m2)", "4649.4")),
    1: (("Weight (Lbs)", "20250"),),
}
_OLD_PATIENT = 2
_ORPHAN_PATIENT = 3


class _Line(NamedTuple):
    drug_type: str
    drug: Drug
    spelling: str
    start: datetime
    pharmacy: int


class Numbers:
    """Where the source's running numbers stand: ids follow from them, spread over their range."""

    def __init__(self) -> None:
        self.admissions = (20_000_000 + number * 6_180_339 % 9_999_991 for number in count())
        self.transfers = (30_000_000 + number * 6_180_339 % 9_999_991 for number in count())
        self._pharmacies = 0

    def pharmacy(self, *, same: bool) -> int:
        """Return the next pharmacy_id, or the last one again."""
        self._pharmacies += not same
        return 10_000_000 + self._pharmacies * 61_803_399 % 89_999_999


def patient_rows(patient: Patient, seed: int, index: int, numbers: Numbers) -> Iterator[Row]:
    """Yield one patient's rows in all tables, defects among them.

    Rows of an admission come in no order of their own (neither seq_num nor time), as in MIMIC-IV.

    Args:
        patient: Whom to write.
        seed: The source's seed.
        index: The patient's number, from 0; the subject_id follows from it.
        numbers: Of the source; go on.
    """
    random = stream(seed, "synthetic-rows", index)
    subject = 10_000_000 + index * 7_368_787 % 9_999_991
    if index == _OLD_PATIENT:
        patient = replace(patient, anchor_age=HIDDEN_OLD_AGE)
    last = patient.stays[-1]
    died = random.random() < 0.03
    yield (
        "hosp/patients",
        (
            *(subject, patient.sex, patient.anchor_age, patient.anchor_year),
            *(patient.anchor_year_group, last.discharged.date() if died else ""),
        ),
    )
    yield from _measure_rows(random, subject, index, patient)
    language = "ENGLISH" if random.random() < 0.9 else "?"
    race = _RACES[random.integers(len(_RACES))]
    for stay in patient.stays:
        ids = (subject, next(numbers.admissions))
        dead = died and stay is last
        yield (
            "hosp/admissions",
            (
                *(*ids, stay.admitted, stay.discharged, stay.discharged if dead else ""),
                *(stay.admission_type, _PROVIDER, "EMERGENCY ROOM", "DIED" if dead else "HOME"),
                *(stay.insurance, language, "SINGLE", race, "", "", int(dead)),
            ),
        )
        yield from _place_rows(random, ids, stay, numbers)
        yield from _coded_and_ordered(random, ids, stay, numbers)
    if index == _ORPHAN_PATIENT or random.random() < _ORPHAN:
        lines = _lines(random, last.orders[:2], last.admitted, numbers, flushes=0)
        yield from _line_rows(random, (subject, 19_000_000 + index % 900_000), lines)


def _coded_and_ordered(
    random: np.random.Generator, ids: tuple[int, int], stay: Stay, numbers: Numbers
) -> Iterator[Row]:
    """Yield diagnoses and orders; a few stays lack the one, the other, or all but flushes."""
    defect = random.random()
    if not _NO_ORDERS <= defect < _NO_ORDERS + _NO_DIAGNOSES:
        yield from _diagnosis_rows(random, ids, stay)
    if defect < _NO_ORDERS:
        return
    flushed = _NO_ORDERS + _NO_DIAGNOSES <= defect < _NO_ORDERS + _NO_DIAGNOSES + _ONLY_FLUSHES
    orders = () if flushed else stay.orders
    yield from _line_rows(random, ids, _lines(random, orders, stay.admitted, numbers))


def _measure_rows(
    random: np.random.Generator, subject: int, index: int, patient: Patient
) -> list[Row]:
    rows: list[tuple[datetime, str, str]] = []
    weight = patient.weight_pounds
    has_height, has_weight = random.random(2) < (0.66, 0.78)
    for number, stay in enumerate(patient.stays):
        day = stay.admitted - timedelta(days=int(random.integers(0, 60)))
        if random.random() < 0.15:
            day = stay.discharged + timedelta(days=2)
        if number and random.random() < 0.4:
            continue
        if has_height:
            rows.append((day, "Height (Inches)", str(patient.height_inches)))
        if has_weight:
            rows.append((day, "Weight (Lbs)", f"{weight:g}"))
            rows.append((day, "Blood Pressure", f"{random.integers(95, 170)}/70"))
        if has_height and has_weight:
            bmi = weight * _BMI_FACTOR / patient.height_inches**2
            rows.append((day, "BMI (kg/m2)", f"{bmi:.1f}"))
        weight = round(weight * float(np.clip(random.normal(1, 0.03), 0.9, 1.1)), 1)
    # On the very day, so that a missing rejection shows in the sample and not only in a count.
    first = patient.stays[0].admitted
    rows += [(first, name, value) for name, value in _OUTLIERS.get(index, ())]
    return _shuffled(
        random,
        [
            ("hosp/omr", (subject, day.date(), number, name, value))
            for number, (day, name, value) in enumerate(rows, 1)
        ],
    )


def _place_rows(
    random: np.random.Generator, ids: tuple[int, int], stay: Stay, numbers: Numbers
) -> Iterator[Row]:
    unit = INTENSIVE_CARE_UNITS[stay.service] if stay.intensive_care else WARDS[stay.service]
    begin, end = stay.admitted, stay.discharged
    half = begin + (end - begin) / 2
    half = half.replace(microsecond=0)
    yield "hosp/services", (*ids, begin, "", stay.service)
    if random.random() < 0.1:
        yield "hosp/services", (*ids, half, stay.service, "SURG")
    moves = (("admit", unit, begin, half), ("transfer", WARDS[stay.service], half, end))
    for event, place, entered, left in (*moves, ("discharge", "", end, "")):
        transfer = next(numbers.transfers)
        yield "hosp/transfers", (*ids, transfer, event, place, entered, left)
        if event == "admit" and stay.intensive_care:
            days = (half - begin).total_seconds() / 86_400
            yield "icu/icustays", (*ids, transfer, unit, unit, begin, half, days)


def _diagnosis_rows(random: np.random.Generator, ids: tuple[int, int], stay: Stay) -> list[Row]:
    rows: list[Row] = []
    for number, code in enumerate(stay.diagnoses, 1):
        row = ("hosp/diagnoses_icd", (*ids, number, code.code, code.version))
        rows += [row] * (1 + int(random.random() < _DUPLICATE))
    return _shuffled(random, rows)


def _lines(
    random: np.random.Generator,
    orders: Sequence[Order],
    admitted: datetime,
    numbers: Numbers,
    *,
    flushes: int | None = None,
) -> list[_Line]:
    """Write orders as lines: repeats, other spellings, copies, vehicles, additives, flushes."""
    lines: list[_Line] = []

    def add(
        drug_type: str, drug: Drug, spelling: str, start: datetime, *, same: bool = False
    ) -> None:
        lines.append(_Line(drug_type, drug, spelling, start, numbers.pharmacy(same=same)))

    for order in orders:
        drug, start = order.drug, order.start
        add("MAIN", drug, drug.name, start)
        chance = random.random(3)
        if chance[0] < _DUPLICATE:
            lines.append(lines[-1])
        if drug.route.startswith("IV") and chance[1] < 0.8:
            vehicle = VEHICLES[random.integers(len(VEHICLES))]
            add("BASE", vehicle, vehicle.name, start, same=True)
        if chance[2] < _REPEAT:
            again = start + timedelta(minutes=int(random.integers(60, 3 * _MINUTES_A_DAY)))
            spelling = drug.name
            if chance[2] < _REPEAT * _VARIANT_OF_REPEATS:
                spelling = _variant(random, drug.name)
            add("MAIN", drug, spelling, again)
    if orders and random.random() < 0.02:
        additive = ADDITIVES[random.integers(len(ADDITIVES))]
        add("ADDITIVE", additive, additive.name, admitted)
    if flushes is None:
        flushes = int(random.integers(1, 3)) if not orders or random.random() < 0.5 else 0
    for _ in range(flushes):
        flush = FLUSHES[int(random.random() < 0.2)]
        add("MAIN", flush, flush.name, admitted + timedelta(minutes=int(random.integers(60, 600))))
    return lines


def _variant(random: np.random.Generator, name: str) -> str:
    """Return another spelling that is equal at the string level."""
    offered = (name.upper(), name.lower(), name.replace(" ", "  "), f"{name} ", f" {name}")
    others = [spelling for spelling in offered if spelling != name]
    return others[random.integers(len(others))]


def _line_rows(
    random: np.random.Generator, ids: tuple[int, int], lines: Sequence[_Line]
) -> list[Row]:
    rows: list[Row] = []
    places = {pharmacy: n for n, pharmacy in enumerate(dict.fromkeys(x.pharmacy for x in lines), 1)}
    for line in lines:
        drug = line.drug
        digits = zlib.crc32(drug.name.encode())
        stop = line.start + timedelta(minutes=_MINUTES_A_DAY)
        number = places[line.pharmacy]
        rows.append(
            (
                "hosp/prescriptions",
                (
                    *(*ids, line.pharmacy, f"{ids[0]}-{number}", number, _PROVIDER),
                    *(line.start, stop, line.drug_type, line.spelling, drug.formulary),
                    *(f"{digits % 80_000:06d}", f"{digits:011d}", drug.strength, ""),
                    *(drug.dose, drug.unit, "1", drug.form, "1", drug.route),
                ),
            )
        )
    return _shuffled(random, rows)


def _shuffled(random: np.random.Generator, rows: list[Row]) -> list[Row]:
    return [rows[place] for place in random.permutation(len(rows))]
