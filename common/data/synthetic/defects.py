"""What chance decides when an invented patient is written down, planted defects included.

All of a patient's draws are made here; ``common.data.synthetic.rows`` counts and writes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import NamedTuple, TypeVar

import numpy as np

from common.data.synthetic.catalogue import ADDITIVES, FLUSHES, VEHICLES, Code, Drug
from common.data.synthetic.patients import HIDDEN_OLD_AGE, Order, Patient, Stay
from common.seeds import stream

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
Measure = tuple[date, int, str, str]
Item = TypeVar("Item")


class Line(NamedTuple):
    """One line of orders."""

    order: int
    """Number within the admission, from 1; a copy and a vehicle have their drug's."""
    drug_type: str
    drug: Drug
    spelling: str
    start: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenStay:
    """An admission as it is written."""

    stay: Stay
    to_surgery: bool
    diagnoses: tuple[tuple[int, Code], ...]
    """seq_num and code."""
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPatient:
    """A patient as it is written; what belongs together comes in no order of its own."""

    patient: Patient
    died: bool
    """In the last stay."""
    language: str
    race: str
    measures: tuple[Measure, ...]
    """Date, seq_num, name and value."""
    stays: tuple[WrittenStay, ...]
    orphans: tuple[Line, ...]
    """Orders of an admission that is nowhere."""


def draw(patient: Patient, seed: int, index: int) -> WrittenPatient:
    """Draw how a patient is written.

    Args:
        patient: Whom to write.
        seed: The source's seed.
        index: The patient's number, from 0.
    """
    random = stream(seed, "synthetic-rows", index)
    if index == _OLD_PATIENT:
        patient = replace(patient, anchor_age=HIDDEN_OLD_AGE)
    return WrittenPatient(
        patient=patient,
        # Arguments are evaluated, and so drawn, in this order.
        died=random.random() < 0.03,
        measures=_measures(random, index, patient),
        language="ENGLISH" if random.random() < 0.9 else "?",
        race=_RACES[random.integers(len(_RACES))],
        stays=tuple(_stay(random, stay) for stay in patient.stays),
        orphans=_orphans(random, index, patient.stays[-1]),
    )


def _measures(random: np.random.Generator, index: int, patient: Patient) -> tuple[Measure, ...]:
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
        [(day.date(), n, name, value) for n, (day, name, value) in enumerate(rows, 1)],
    )


def _stay(random: np.random.Generator, stay: Stay) -> WrittenStay:
    """Draw one admission; a few lack diagnoses, orders, or all orders but flushes."""
    to_surgery, defect = random.random() < 0.1, random.random()
    diagnoses: tuple[tuple[int, Code], ...] = ()
    lines: tuple[Line, ...] = ()
    if not _NO_ORDERS <= defect < _NO_ORDERS + _NO_DIAGNOSES:
        diagnoses = _diagnoses(random, stay)
    if defect >= _NO_ORDERS:
        lacking = _NO_ORDERS + _NO_DIAGNOSES
        orders = () if lacking <= defect < lacking + _ONLY_FLUSHES else stay.orders
        lines = _lines(random, orders, stay.admitted)
    return WrittenStay(stay=stay, to_surgery=to_surgery, diagnoses=diagnoses, lines=lines)


def _diagnoses(random: np.random.Generator, stay: Stay) -> tuple[tuple[int, Code], ...]:
    rows: list[tuple[int, Code]] = []
    for number, code in enumerate(stay.diagnoses, 1):
        rows += [(number, code)] * (1 + int(random.random() < _DUPLICATE))
    return _shuffled(random, rows)


def _orphans(random: np.random.Generator, index: int, last: Stay) -> tuple[Line, ...]:
    if index == _ORPHAN_PATIENT or random.random() < _ORPHAN:
        return _lines(random, last.orders[:2], last.admitted, flushed=False)
    return ()


def _lines(
    random: np.random.Generator,
    orders: Sequence[Order],
    admitted: datetime,
    *,
    flushed: bool = True,
) -> tuple[Line, ...]:
    """Write orders as lines, with additives and flushes."""
    lines: list[Line] = []
    for order in orders:
        lines += _lines_of(random, order, _next(lines))
    if orders and random.random() < 0.02:
        additive = ADDITIVES[random.integers(len(ADDITIVES))]
        lines.append(Line(_next(lines), "ADDITIVE", additive, additive.name, admitted))
    if flushed and (not orders or random.random() < 0.5):
        for _ in range(random.integers(1, 3)):
            flush = FLUSHES[int(random.random() < 0.2)]
            start = admitted + timedelta(minutes=int(random.integers(60, 600)))
            lines.append(Line(_next(lines), "MAIN", flush, flush.name, start))
    return _shuffled(random, lines)


def _next(lines: Sequence[Line]) -> int:
    return lines[-1].order + 1 if lines else 1


def _lines_of(random: np.random.Generator, order: Order, number: int) -> list[Line]:
    """Write one order: perhaps twice, with a vehicle, and again later in another spelling."""
    drug = order.drug
    lines = [Line(number, "MAIN", drug, drug.name, order.start)]
    copied, dissolved, repeated = random.random(3)
    if copied < _DUPLICATE:
        lines *= 2
    if drug.route.startswith("IV") and dissolved < 0.8:
        vehicle = VEHICLES[random.integers(len(VEHICLES))]
        lines.append(Line(number, "BASE", vehicle, vehicle.name, order.start))
    if repeated < _REPEAT:
        later = timedelta(minutes=int(random.integers(60, 3 * _MINUTES_A_DAY)))
        spelling = drug.name
        if repeated < _REPEAT * _VARIANT_OF_REPEATS:
            spelling = _variant(random, drug.name)
        lines.append(Line(number + 1, "MAIN", drug, spelling, order.start + later))
    return lines


def _variant(random: np.random.Generator, name: str) -> str:
    """Return another spelling that is equal at the string level."""
    offered = (name.upper(), name.lower(), name.replace(" ", "  "), f"{name} ", f" {name}")
    others = [spelling for spelling in offered if spelling != name]
    return others[random.integers(len(others))]


def _shuffled(random: np.random.Generator, rows: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(rows[place] for place in random.permutation(len(rows)))
