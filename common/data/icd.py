"""Search in diagnosis titles: of the loaded table, or of the public ICD-10-CM."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.data.names import normalise_string
from common.data.samples import Admission

_CODE = re.compile(r"[a-z]?\d[\da-z.]*", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A diagnosis as a prompt shows it."""

    title: str
    code: str = ""
    """``10:I10`` or ``9:4019``; empty for free text."""

    @property
    def label(self) -> str:
        """The code as people write it, with the version where it is not ICD-10; no ICD, no label.

        >>> Diagnosis(title="", code="10:E119").label, Diagnosis(title="", code="9:4019").label
        ('E11.9', '401.9 (ICD-9)')
        """
        version, _, code = self.code.partition(":")
        if version not in ("9", "10"):
            return ""
        whole = 4 if version == "9" and code.startswith("E") else 3
        dotted = f"{code[:whole]}.{code[whole:]}" if len(code) > whole else code
        return f"{dotted} (ICD-9)" if version == "9" else dotted


class DiagnosisIndex:
    """Finds diagnoses by code or by words of the title.

    Args:
        diagnoses: All of them; of equal codes the first counts.
        frequency: How often each code was seen in training data; common ones come first.
        origin: Where they are from, for the person who searches.
    """

    def __init__(
        self, diagnoses: Iterable[Diagnosis], *, frequency: Mapping[str, int], origin: str
    ) -> None:
        self.origin = origin
        self._by_code: dict[str, Diagnosis] = {}
        for diagnosis in diagnoses:
            self._by_code.setdefault(diagnosis.code, diagnosis)
        self._by_title: dict[str, Diagnosis] = {}
        ordered = sorted(
            self._by_code.values(),
            key=lambda d: (-frequency.get(d.code, 0), not d.code.startswith("10:"), d.code),
        )
        for diagnosis in ordered:
            self._by_title.setdefault(normalise_string(diagnosis.title), diagnosis)
        self._rows = [
            (diagnosis.code.partition(":")[2].lower(), f" {_folded(diagnosis.title)}", diagnosis)
            for diagnosis in ordered
        ]

    def __len__(self) -> int:
        """Return how many diagnoses can be found."""
        return len(self._rows)

    def search(self, query: str, *, limit: int = 20) -> list[Diagnosis]:
        """Return the diagnoses whose code starts with the query, or whose title has all its words.

        Words match from their start. Exact codes come first, then common diagnoses.
        """
        code = query.strip().replace(".", "").lower()
        words = _WORD.findall(query.casefold())
        if not words:
            return []
        exact: list[Diagnosis] = []
        found: list[Diagnosis] = []
        by_code = bool(_CODE.fullmatch(query.strip()))
        for row_code, title, diagnosis in self._rows:
            if by_code and row_code == code:
                exact.append(diagnosis)
            elif len(found) < limit and (
                (by_code and row_code.startswith(code))
                or all(f" {word}" in title for word in words)
            ):
                found.append(diagnosis)
        return [*exact, *found][:limit]

    def read(self, text: str) -> Diagnosis:
        """Return the diagnosis that a person wrote: a code, a title, or else free text.

        A code without a version is looked up in ICD-10 first.
        """
        if known := self._by_code.get(text):
            return known
        code = text.strip().replace(".", "").upper()
        for version in ("10", "9"):
            if known := self._by_code.get(f"{version}:{code}"):
                return known
        clean = " ".join(text.split())
        return self._by_title.get(normalise_string(clean)) or Diagnosis(title=clean)


def public_diagnoses() -> list[Diagnosis]:
    """Return every billable code of ICD-10-CM with its title; reading them takes seconds.

    The classification is the National Center for Health Statistics' (public domain), as the
    package ``simple-icd-10-cm`` carries it.
    """
    import simple_icd_10_cm as icd

    return [
        Diagnosis(title=icd.get_description(code), code=f"10:{code}")
        for code in dict.fromkeys(icd.get_all_codes(False))
        if icd.is_leaf(code)
    ]


def code_frequency(admissions: Sequence[Admission]) -> Counter[str]:
    """Count in how many admissions each code stands."""
    return Counter(code for one in admissions for code in set(one.diagnosis_codes))


def _folded(title: str) -> str:
    return " ".join(_WORD.findall(title.casefold()))
