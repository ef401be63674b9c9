"""The table rows of one invented patient, the defects planted in them, and a count of both."""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from common.data.synthetic.catalogue import (
    ADDITIVES,
    FLUSHES,
    GROUPS,
    INTENSIVE_CARE_UNITS,
    STATUS_CODES,
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
_OUTLIER_PATIENT = 0
_HEAVY_PATIENT = 1
_OLD_PATIENT = 2
_ORPHAN_PATIENT = 3


class _Line(NamedTuple):
    drug_type: str
    drug: Drug
    spelling: str
    start: datetime
    pharmacy: int


class Tally:
    """What was written so far: planted defects, and what a correct cleaning must count."""

    def __init__(self) -> None:
        self.planted: Counter[str] = Counter()
        self.drug_type: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.names: set[str] = set()
        self.shortest = self.longest = 0
        self.admissions = self.pharmacies = self.transfers = 0

    def sample(self, drugs: int, height: bool, weight: bool) -> None:
        """Count one admission that has diagnoses and drugs."""
        self.shortest = min(self.shortest or drugs, drugs)
        self.longest = max(self.longest, drugs)
        self.counts["samples"] += 1
        self.counts["drugs"] += drugs
        self.counts["height"] += height
        self.counts["weight"] += weight
        self.counts["height_and_weight"] += height and weight
        self.counts["no_height_no_weight"] += not (height or weight)

    def expected(self, rows: Mapping[str, int]) -> dict[str, Any]:
        """Return the counts under the names that ``fedrx data describe`` prints."""
        names = (
            *("pairs_raw", "pairs_normalised", "pairs_clean", "flush_rows", "samples", "patients"),
            *("age_differs_from_anchor", "age_over_89"),
            *("height", "weight", "height_and_weight", "no_height_no_weight"),
        )
        return {
            "rows": dict(rows),
            "drug_type": {kind: self.drug_type[kind] for kind in ("MAIN", "BASE", "ADDITIVE")},
            **{name: self.counts[name] for name in names},
            "names_clean": len(self.names),
            "drugs_per_sample": {
                "mean": self.counts["drugs"] / max(1, self.counts["samples"]),
                "min": self.shortest,
                "max": self.longest,
            },
            "diagnosis_rows_joined": rows["diagnoses_icd"],
            "diagnosis_rows_unmatched": 0,
            "outliers": {kind: self.planted[f"{kind}_outliers"] for kind in _OUTLIERS},
        }


_OUTLIERS = ("height", "weight", "bmi")


def patient_rows(patient: Patient, seed: int, index: int, tally: Tally) -> Iterator[Row]:
    """Yield one patient's rows in all tables, and count them in ``tally``.

    Rows of an admission come in no order of their own (neither seq_num nor time), as in MIMIC-IV.

    Args:
        patient: Whom to write.
        seed: The source's seed.
        index: The patient's number, from 0; ids follow from it and from ``tally``.
        tally: Updated.
    """
    random = stream(seed, "synthetic-rows", index)
    subject = 10_000_000 + index * 7_368_787 % 9_999_991
    if index == _OLD_PATIENT:
        patient = replace(patient, anchor_age=HIDDEN_OLD_AGE)
    tally.planted["patients_above_89"] += patient.anchor_age == HIDDEN_OLD_AGE
    last = patient.stays[-1]
    died = random.random() < 0.03
    yield (
        "hosp/patients",
        (
            *(subject, patient.sex, patient.anchor_age, patient.anchor_year),
            *(patient.anchor_year_group, last.discharged.date() if died else ""),
        ),
    )
    known, rows = _measure_rows(random, subject, index, patient, tally)
    yield from rows
    samples = tally.counts["samples"]
    language = "ENGLISH" if random.random() < 0.9 else "?"
    race = _RACES[random.integers(len(_RACES))]
    for stay in patient.stays:
        admission = 20_000_000 + tally.admissions * 6_180_339 % 9_999_991
        tally.admissions += 1
        age = patient.anchor_age + stay.admitted.year - patient.anchor_year
        tally.counts["age_differs_from_anchor"] += age != patient.anchor_age
        tally.counts["age_over_89"] += age > 89
        ids = (subject, admission)
        dead = died and stay is last
        yield (
            "hosp/admissions",
            (
                *(*ids, stay.admitted, stay.discharged, stay.discharged if dead else ""),
                *(stay.admission_type, _PROVIDER, "EMERGENCY ROOM", "DIED" if dead else "HOME"),
                *(stay.insurance, language, "SINGLE", race, "", "", int(dead)),
            ),
        )
        yield from _place_rows(random, ids, stay, tally)
        defect = random.random()
        coded = not _NO_ORDERS <= defect < _NO_ORDERS + _NO_DIAGNOSES
        if coded:
            yield from _diagnosis_rows(random, ids, stay, tally)
        tally.planted["stays_without_diagnoses"] += not coded
        lines: list[_Line] = []
        if defect < _NO_ORDERS:
            tally.planted["stays_without_orders"] += 1
        elif _NO_ORDERS + _NO_DIAGNOSES <= defect < _NO_ORDERS + _NO_DIAGNOSES + _ONLY_FLUSHES:
            lines = _lines(random, (), stay.admitted, tally)
            tally.planted["stays_with_only_flushes"] += 1
        else:
            lines = _lines(random, stay.orders, stay.admitted, tally)
        drugs = _count_lines(lines, tally)
        if coded and drugs:
            tally.sample(drugs, *(_known_before(days, stay) for days in known))
        yield from _line_rows(random, ids, lines)
    if index == _ORPHAN_PATIENT or random.random() < _ORPHAN:
        lines = _lines(random, last.orders[:2], last.admitted, tally, flushes=0)
        for line in lines:
            tally.drug_type[line.drug_type] += 1
            tally.planted["orphan_rows"] += line.drug_type == "MAIN"
        yield from _line_rows(random, (subject, 19_000_000 + index % 900_000), lines)
    tally.counts["patients"] += tally.counts["samples"] > samples


def _measure_rows(
    random: np.random.Generator, subject: int, index: int, patient: Patient, tally: Tally
) -> tuple[tuple[list[datetime], list[datetime]], list[Row]]:
    """Return the days on which height and weight became known, and the rows of omr."""
    rows: list[tuple[datetime, str, str]] = []
    heights: list[datetime] = []
    weights: list[datetime] = []
    weight = patient.weight_pounds
    has_height, has_weight = random.random(2) < (0.66, 0.78)
    for number, stay in enumerate(patient.stays):
        day = stay.admitted - timedelta(days=int(random.integers(0, 60)))
        late = random.random() < 0.15
        if late:
            day = stay.discharged + timedelta(days=2)
            tally.planted["measures_after_admission"] += 1
        if number and random.random() < 0.4:
            continue
        if has_height:
            heights.append(day)
            rows.append((day, "Height (Inches)", str(patient.height_inches)))
        if has_weight:
            weights.append(day)
            rows.append((day, "Weight (Lbs)", f"{weight:g}"))
            rows.append((day, "Blood Pressure", f"{random.integers(95, 170)}/70"))
        if has_height and has_weight:
            bmi = weight * _BMI_FACTOR / patient.height_inches**2
            rows.append((day, "BMI (kg/m2)", f"{bmi:.1f}"))
        weight = round(weight * float(np.clip(random.normal(1, 0.03), 0.9, 1.1)), 1)
    first = patient.stays[0].admitted
    # On the very day, so that a missing rejection shows in the sample and not only in a count.
    if index == _OUTLIER_PATIENT:
        rows += [(first, "Height (Inches)", "5"), (first, "BMI (kg/m2)", "4649.4")]
        tally.planted["height_outliers"] += 1
        tally.planted["bmi_outliers"] += 1
    if index == _HEAVY_PATIENT:
        rows.append((first, "Weight (Lbs)", "20250"))
        tally.planted["weight_outliers"] += 1
    numbered: list[Row] = [
        ("hosp/omr", (subject, day.date(), number, name, value))
        for number, (day, name, value) in enumerate(rows, 1)
    ]
    return (heights, weights), _shuffled(random, numbered)


def _known_before(days: Sequence[datetime], stay: Stay) -> bool:
    return any(day.date() <= stay.admitted.date() for day in days)


def _place_rows(
    random: np.random.Generator, ids: tuple[int, int], stay: Stay, tally: Tally
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
        transfer = 30_000_000 + tally.transfers * 6_180_339 % 9_999_991
        tally.transfers += 1
        yield "hosp/transfers", (*ids, transfer, event, place, entered, left)
        if event == "admit" and stay.intensive_care:
            days = (half - begin).total_seconds() / 86_400
            yield "icu/icustays", (*ids, transfer, unit, unit, begin, half, days)


def _diagnosis_rows(
    random: np.random.Generator, ids: tuple[int, int], stay: Stay, tally: Tally
) -> list[Row]:
    clash = _clashing_codes()
    rows: list[Row] = []
    for number, code in enumerate(stay.diagnoses, 1):
        row = ("hosp/diagnoses_icd", (*ids, number, code.code, code.version))
        copies = 1 + int(random.random() < _DUPLICATE)
        rows += [row] * copies
        tally.planted["duplicate_diagnosis_rows"] += copies - 1
        tally.planted["leading_zero_rows"] += copies * code.code.startswith("0")
        tally.planted["clashing_code_rows"] += copies * (code.code in clash)
    return _shuffled(random, rows)


@lru_cache(maxsize=1)
def _clashing_codes() -> frozenset[str]:
    codes = {code for group in GROUPS for code in group.codes}
    codes |= {code for status in STATUS_CODES for code in status}
    times = Counter(code.code for code in codes)
    return frozenset(code for code, number in times.items() if number > 1)


def _lines(
    random: np.random.Generator,
    orders: Sequence[Order],
    admitted: datetime,
    tally: Tally,
    *,
    flushes: int | None = None,
) -> list[_Line]:
    """Write orders as lines: repeats, other spellings, copies, vehicles, additives, flushes."""
    lines: list[_Line] = []

    def add(
        drug_type: str, drug: Drug, spelling: str, start: datetime, *, same: bool = False
    ) -> None:
        tally.pharmacies += not same
        number = 10_000_000 + tally.pharmacies * 61_803_399 % 89_999_999
        lines.append(_Line(drug_type, drug, spelling, start, number))

    for order in orders:
        drug, start = order.drug, order.start
        add("MAIN", drug, drug.name, start)
        chance = random.random(3)
        if chance[0] < _DUPLICATE:
            lines.append(lines[-1])
            tally.planted["duplicate_prescription_rows"] += 1
        if drug.route.startswith("IV") and chance[1] < 0.8:
            vehicle = VEHICLES[random.integers(len(VEHICLES))]
            add("BASE", vehicle, vehicle.name, start, same=True)
        if chance[2] < _REPEAT:
            again = start + timedelta(minutes=int(random.integers(60, 3 * _MINUTES_A_DAY)))
            spelling = drug.name
            if chance[2] < _REPEAT * _VARIANT_OF_REPEATS:
                spelling = _variant(random, drug.name)
                tally.planted["spelling_variant_rows"] += 1
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


def _count_lines(lines: Sequence[_Line], tally: Tally) -> int:
    """Count one existing admission's lines; return the length of its drug list."""
    main = [line for line in lines if line.drug_type == "MAIN"]
    clean = {line.drug.name for line in main if line.drug not in FLUSHES}
    tally.drug_type.update(line.drug_type for line in lines)
    tally.counts["pairs_raw"] += len({line.spelling for line in main})
    tally.counts["pairs_normalised"] += len({line.drug.name for line in main})
    tally.counts["pairs_clean"] += len(clean)
    tally.counts["flush_rows"] += sum(line.drug in FLUSHES for line in main)
    tally.names |= clean
    return len(clean)


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
