"""Invented patients: who they are, what they have, and which drugs follow from it.

One random stream per patient: patient 7 is the same person in a source of 10 and of 100,000.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.synthetic.catalogue import (
    ADMISSION_TYPES,
    ANCHOR_YEAR_GROUPS,
    BACKGROUND,
    DRUGS,
    GROUPS,
    INSURANCES,
    STATUS_CODES,
    STATUS_SHARE,
    Code,
    Drug,
)
from common.seeds import stream

HIDDEN_OLD_AGE = 91
"""MIMIC-IV's anchor_age of everybody above 89."""
FIRST_ICD10_YEAR = 2016
_ADMISSIONS_SHARE = (0.55, 0.23, 0.11, 0.06, 0.03, 0.02)
_CODED_SHARE = 0.95
_CHRONIC_FIRST_SHARE = 0.45
"""Stays whose main diagnosis is a chronic one that got worse."""
_STRAY_DRUG_SHARE = 0.003
_LATE_ORDER_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One drug ordered in a stay."""

    drug: Drug
    start: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """One admission."""

    admitted: datetime
    discharged: datetime
    service: str
    admission_type: str
    insurance: str
    intensive_care: bool
    diagnoses: tuple[Code, ...]
    """By seq_num."""
    orders: tuple[Order, ...]
    """Distinct drugs in the order in which the ward writes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """One invented patient."""

    sex: str
    anchor_age: int
    anchor_year: int
    anchor_year_group: str
    height_inches: int
    weight_pounds: float
    """At the first admission."""
    stays: tuple[Stay, ...]


@cache
def _of_groups(field: str) -> NDArray[Any]:
    """Return one field of all groups, [G]."""
    return np.array([getattr(group, field) for group in GROUPS])


def simulate(seed: int, index: int) -> Patient:
    """Invent patient number ``index`` of ``seed``.

    Chronic groups stay with a patient; every admission adds at least one acute group. Drugs
    follow from the groups (also from the few that were not coded), from a background that many
    inpatients get, and from chance.
    """
    random = stream(seed, "synthetic-patient", index)
    chronic_G, prevalence_G = _of_groups("chronic"), _of_groups("prevalence")
    acute_G = np.where(chronic_G, 0.0, prevalence_G)
    sex = "FM"[int(random.random() < 0.5)]
    age = int(np.clip(random.normal(63, 16), 18, 95))
    present = random.random(len(GROUPS)) < _shares(age, sex)
    chronic = np.flatnonzero(present & chronic_G)
    number = 1 + int(random.choice(len(_ADMISSIONS_SHARE), p=_ADMISSIONS_SHARE))
    anchor_year = int(random.integers(2110, 2190))
    year_group = int(random.integers(len(ANCHOR_YEAR_GROUPS)))
    height = round(random.normal(64 if sex == "F" else 69, 2.8))
    weight = round(float(np.clip(random.normal(28.5, 5.5), 16, 55)) * height**2 / 703.07, 1)
    insurance = "Medicare" if age >= 65 and random.random() < 0.7 else _pick(random, INSURANCES)
    begin = datetime(anchor_year, 1, 1) + timedelta(minutes=int(random.integers(0, 525_000)))
    stays = []
    for _ in range(number):
        calendar_year = 2009 + 3 * year_group + begin.year - anchor_year
        age_now = age + begin.year - anchor_year
        acute = (random.random(len(GROUPS)) < _shares(age_now, sex)) & ~chronic_G
        if not acute.any():
            acute[random.choice(len(GROUPS), p=acute_G / acute_G.sum())] = True
        stay = _stay(
            random,
            begin,
            version=10 if calendar_year >= FIRST_ICD10_YEAR else 9,
            acute=random.permutation(np.flatnonzero(acute)),
            chronic=random.permutation(chronic),
            insurance=insurance,
        )
        stays.append(stay)
        begin = stay.discharged + timedelta(minutes=int(random.exponential(400_000)) + 20_000)
    return Patient(
        sex=sex,
        anchor_age=age if age <= 89 else HIDDEN_OLD_AGE,
        anchor_year=anchor_year,
        anchor_year_group=ANCHOR_YEAR_GROUPS[year_group],
        height_inches=height,
        weight_pounds=weight,
        stays=tuple(stays),
    )


def _shares(age: int, sex: str) -> NDArray[np.float64]:
    prevalence_G = _of_groups("prevalence")
    log_odds_G = np.log(prevalence_G / (1 - prevalence_G))
    shares_G = 1 / (1 + np.exp(-log_odds_G - _of_groups("per_decade") * (age - 60) / 10))
    allowed_G: NDArray[np.bool_] = np.isin(_of_groups("sex"), ("", sex))
    return shares_G * allowed_G


def _stay(
    random: np.random.Generator,
    admitted: datetime,
    *,
    version: int,
    acute: NDArray[np.int64],
    chronic: NDArray[np.int64],
    insurance: str,
) -> Stay:
    coded = chronic[random.random(len(chronic)) < _CODED_SHARE]
    reasons = [*acute, *coded]
    if len(coded) and random.random() < _CHRONIC_FIRST_SHARE:
        reasons = [*coded[:1], *acute, *coded[1:]]
    first = GROUPS[reasons[0]]
    minutes = 2_000 + int(random.exponential(5_000))
    codes = [_coded(random, GROUPS[group].codes, version) for group in reasons]
    for codes_of_status, drawn in zip(STATUS_CODES, random.random(len(STATUS_CODES)), strict=True):
        if drawn < STATUS_SHARE:
            codes.append(_coded(random, codes_of_status, version))
    admission_type = _pick(random, ADMISSION_TYPES)
    if first.service == "ORTHO" and random.random() < 0.5:
        admission_type = "SURGICAL SAME DAY ADMISSION"
    return Stay(
        admitted=admitted,
        discharged=admitted + timedelta(minutes=minutes),
        service=first.service,
        admission_type=admission_type,
        insurance=insurance,
        intensive_care=first.name in ("sepsis", "respiratory failure", "infarction", "stroke"),
        diagnoses=tuple(codes),
        orders=_orders(random, admitted, minutes, [*reasons, *sorted(set(chronic) - set(coded))]),
    )


def _orders(
    random: np.random.Generator, admitted: datetime, minutes: int, groups: list[int]
) -> tuple[Order, ...]:
    """Draw the drugs: background first, then group by group, a tenth of them late."""
    offers = [*BACKGROUND, *(offer for group in groups for offer in GROUPS[group].drugs)]
    taken = random.random(len(offers)) < [share for _, share in offers]
    is_stray = random.random(len(DRUGS)) < _STRAY_DRUG_SHARE
    names = [name for name, _ in compress(offers, taken)]
    names = list(dict.fromkeys([*names, *compress(DRUGS, is_stray)]))
    late = random.random(len(names)) < _LATE_ORDER_SHARE
    later = random.integers(1_000, minutes, len(names))
    return tuple(
        Order(
            drug=DRUGS[name],
            start=admitted + timedelta(minutes=int(later[rank]) if late[rank] else 10 + 7 * rank),
        )
        for rank, name in enumerate(names)
    )


def _coded(random: np.random.Generator, codes: tuple[Code, ...], version: int) -> Code:
    fitting = [code for code in codes if code.version == version]
    return fitting[int(random.integers(len(fitting)))]


def _pick(random: np.random.Generator, shares: dict[str, float]) -> str:
    return list(shares)[int(random.choice(len(shares), p=list(shares.values())))]
