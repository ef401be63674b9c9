"""What the rest of the system knows of the data: one admission is one sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """One sample: who came, what was found, and which drugs were ordered.

    ``patient`` and ``admission`` are local keys: they never enter a prompt, a log, a metric or a
    report. Within a table, the admissions of one patient stand in the order of time.
    """

    patient: int
    admission: int
    sex: str
    """As in patients.gender: ``F`` or ``M``."""
    age: int
    """Years at admission; above 89 it is printed as ``> 89``."""
    height_cm: float | None = None
    weight_kg: float | None = None
    bmi: float | None = None
    """kg/m2."""
    diagnoses: tuple[str, ...] = ()
    """Titles in the order of seq_num."""
    diagnosis_codes: tuple[str, ...] = ()
    """``10:I10`` or ``9:4019``, parallel to ``diagnoses``."""
    drugs: tuple[str, ...] = ()
    """Distinct at the string level, by first start."""
    service: str = UNKNOWN
    admission_type: str = UNKNOWN
    insurance: str = UNKNOWN
    anchor_year_group: str = UNKNOWN
    careunit: str = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """All samples of one source, and how they came about."""

    admissions: tuple[Admission, ...]
    counts: Mapping[str, Any]
    """What ``describe --json`` prints about cleaning; holds no patient rows."""
    source: str
    """``synthetic``, ``demo`` or ``credentialed``."""
    file_hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every table that was read, by its path below the data folder."""
    digest: str = ""
    """sha256 over the admissions: equal digests mean equal samples."""
