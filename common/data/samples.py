"""What the rest of the system knows of the data: one admission is one sample."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import polars as pl

from common.records import Record

UNKNOWN = "unknown"
Progress = Callable[[str], None]
"""Is called with one line for each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """An earlier stay of the same patient, as far as the protocol shows it."""

    diagnoses: tuple[str, ...] = ()
    """Titles in the order of seq_num."""
    diagnosis_codes: tuple[str, ...] = ()
    procedures: tuple[str, ...] = ()
    """Titles in the order of seq_num."""
    drugs: tuple[str, ...] = ()
    """By first start."""


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
    site: str = UNKNOWN
    """The hospital that the data names; it deals patients, and is shown nowhere."""
    protocol: str = "admission"
    """What is asked, ``data.protocol``; below stands what only other protocols show."""
    earlier: tuple[Visit, ...] = ()
    """The oldest first."""
    procedures: tuple[str, ...] = ()
    """Titles in the order of seq_num."""
    services: tuple[str, ...] = ()
    """Of the first 24 hours, in the order of time."""
    labs: tuple[str, ...] = ()
    """Results of the first 24 hours, one text each, what matters most first."""
    ordered: tuple[str, ...] = ()
    """Drugs of the first 24 hours, by first start; ``drugs`` holds none of them."""


class Range(Record):
    """Smallest and largest value."""

    min: int
    max: int


class Lengths(Record):
    """How long the lists are."""

    mean: float
    min: int
    max: int


class Outliers(Record):
    """Body measures outside of what is plausible, in rows."""

    height: int = 0
    weight: int = 0
    bmi: int = 0


class BmiCheck(Record):
    """Patient-days with height, weight and BMI, and in how many the three agree."""

    triples: int = 0
    within_one: int = 0
    """BMI within 1 kg/m2 of what height and weight give."""


class ProtocolCounts(Record):
    """What a protocol other than ``admission`` counted."""

    name: str
    absent: tuple[str, ...]
    """Optional tables that are not there, or that this kind of data does not serve."""
    counted: dict[str, int]


class Counts(Record):
    """What cleaning counted, as ``fedrx data describe --json`` and data.json say it."""

    absent_when_none: ClassVar[tuple[str, ...]] = ("protocol",)
    rows: dict[str, int]
    """Rows read, by table."""
    rows_out: dict[str, int]
    """Rows or list items that are in use, by table."""
    drug_type: dict[str, int]
    pairs_raw: int
    """Distinct (admission, spelling) of the main drugs."""
    pairs_normalised: int
    pairs_clean: int
    """The same at the string level, and without flushes."""
    names_clean: int
    flush_rows: int
    samples: int
    patients: int
    drugs_per_sample: Lengths
    diagnosis_rows_joined: int
    diagnosis_rows_unmatched: int
    age_differs_from_anchor: int
    age_over_89: int
    age: Range
    height: int
    """Samples with a height; and so on."""
    weight: int
    height_and_weight: int
    no_height_no_weight: int
    outliers: Outliers
    bmi_check: BmiCheck
    dropped: dict[str, int]
    """Rows left out, by ``table.reason``; with ``rows_out`` they add up to ``rows``."""
    null_spelled: dict[str, int]
    """Cells that spelled NULL, by ``table.column``."""
    protocol: ProtocolCounts | None = None
    """Of ``data.protocol``; no key for ``admission``."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Samples in columns; lists hold indices into the vocabularies."""

    frame: pl.DataFrame
    """One row per sample, in the order of patient and time; columns as in ``Admission``.

    With a protocol of earlier visits the first row of a patient holds them all
    (``visit_diagnoses``, ``visit_procedures``, ``visit_drugs``), and ``earlier`` of each row says
    which of them come before it.
    """
    drugs: tuple[str, ...]
    titles: tuple[str, ...]
    codes: tuple[str, ...]
    counts: Counts
    procedures: tuple[str, ...] = ()
    """Titles."""


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """All samples of one source, and how they came about."""

    admissions: tuple[Admission, ...]
    counts: Counts
    source: str
    """``synthetic``, ``demo`` or ``credentialed``."""
    file_hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every table that was read, by its path below the data folder."""
    digest: str = ""
    """sha256 over the admissions: equal digests mean equal samples."""
