"""FHIR R4 resources of a patient's chart in, draft orders out.

``fhir.resources`` validates every resource that is read; its R4B models have all of R4 that is used
here. What it cannot read is refused in one line that names the place and never the content.
"""

import datetime
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from common.data.icd import DiagnosisIndex
from common.data.names import normalise
from sim.assist.patient_form import MOST_DIAGNOSES
from sim.process.extras import require_extra

SEXES = {"female": "F", "male": "M"}
ICD_SYSTEMS = {
    "http://hl7.org/fhir/sid/icd-10-cm": "10",
    "http://hl7.org/fhir/sid/icd-10": "10",
    "urn:oid:2.16.840.1.113883.6.90": "10",
    "http://hl7.org/fhir/sid/icd-9-cm": "9",
    "urn:oid:2.16.840.1.113883.6.103": "9",
}
GENDERS = {*SEXES, "other", "unknown"}
ORDER_STATUSES = {
    *("active", "on-hold", "cancelled", "completed", "entered-in-error", "stopped", "draft"),
    "unknown",
}
NOT_HAD = {"inactive", "remission", "resolved", "refuted", "entered-in-error"}
"""Statuses of a Condition that the patient does not have now."""
IN_FORCE = {"active", "on-hold", "draft"}
"""Statuses of a MedicationRequest that is ordered, or being ordered."""
MOST_ENTRIES = 1000
"""Of one bundle: they are validated before anything is answered."""
_BIRTH_DATE = re.compile(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?")
_FIELD = re.compile(r"\w{1,40}")


class BadResource(ValueError):
    """A resource that cannot be read: one line, without anything of its content."""


class Missing(BadResource):
    """Something that the service needs and was not sent."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is read of a patient."""

    form: Mapping[str, Any]
    """As ``sim.assist.patient_form.read_form`` takes it; heights and weights are not asked for."""
    ordered: tuple[frozenset[str], ...]
    """The ingredients of each order that is in force or being written."""
    notes: tuple[str, ...]
    """What was left out, for the reader."""


def require_fhir() -> None:
    """Check that the validator is installed.

    Raises:
        UserError: if it is not.
    """
    require_extra("fhir", needed_by="--cds-hooks", without="leave --cds-hooks out")


def read_chart(
    patient: Any,
    conditions: Any,
    medications: Sequence[tuple[str, Any]],
    *,
    patient_id: str,
    index: DiagnosisIndex,
    today: datetime.date,
) -> Chart:
    """Read a patient's resources.

    Args:
        patient: A Patient.
        conditions: A Bundle with Conditions, or None for none.
        medications: Bundles with MedicationRequests, or None, each with its place in the request.
        patient_id: Whose all of them must be.
        index: Where ICD codes and titles are looked up.
        today: For the age.

    Raises:
        BadResource: for a resource that is not R4, not of its kind, or another patient's.
        Missing: without a Patient.
    """
    person = _person(patient, patient_id)
    notes: list[str] = []
    diagnoses = _conditions(conditions, patient_id, index, notes)
    ordered = _orders(medications, patient_id, notes)
    return Chart(
        form={
            "sex": SEXES.get(str(person.gender), ""),
            "age": age_in_years(str(person.birthDate or ""), today),
            "diagnoses": diagnoses,
        },
        ordered=ordered,
        notes=tuple(dict.fromkeys(notes)),
    )


def age_in_years(birth_date: str, today: datetime.date) -> int | None:
    """Return whole years; where only a year or a month is known, from its first day on.

    >>> age_in_years("1955-11-27", datetime.date(2026, 11, 26))
    70
    >>> age_in_years("1955-11", datetime.date(2026, 11, 26))
    71
    >>> age_in_years("", datetime.date(2026, 11, 26)) is None
    True
    """
    found = _BIRTH_DATE.fullmatch(birth_date)
    if not found:
        return None
    year, month, day = (int(part or 1) for part in found.groups())
    return today.year - year - ((today.month, today.day) < (month, day))


def is_ordered(drug: str, ordered: Iterable[frozenset[str]]) -> bool:
    """Tell whether one of the orders has all ingredients of a drug.

    >>> is_ordered("Furosemide", [ingredients("furosemide 40 MG Oral Tablet")])
    True
    >>> is_ordered("Furosemide", [ingredients("Torsemide 20 MG")])
    False
    """
    return any(ingredients(drug) <= order for order in ordered)


def ingredients(drug: str) -> frozenset[str]:
    """Return what a drug's text names, by the rules of ``common.data.names``."""
    return frozenset(normalise(drug, "ingredient"))


def draft_order(drug: str, patient_id: str) -> dict[str, Any]:
    """Return a proposed MedicationRequest as JSON; nothing but drug and patient is filled in."""
    from fhir.resources.R4B.medicationrequest import MedicationRequest

    order = MedicationRequest.model_validate(
        {
            "resourceType": "MedicationRequest",
            "status": "draft",
            "intent": "proposal",
            "medicationCodeableConcept": {"text": drug},
            "subject": {"reference": f"Patient/{patient_id}"},
        }
    )
    content: dict[str, Any] = order.model_dump(mode="json")
    return content


def _person(patient: Any, patient_id: str) -> Any:
    place = "prefetch.patient"
    if patient is None:
        raise Missing(f"{place} is missing")
    person = _read("Patient", patient, place)
    if person.id not in (None, patient_id):
        raise BadResource(f"{place}: it is not the patient of context.patientId")
    _check_code(person.gender, GENDERS | {None}, f"{place}: gender")
    return person


def _conditions(bundle: Any, patient_id: str, index: DiagnosisIndex, notes: list[str]) -> list[str]:
    """Return the diagnoses that the patient has now, each once; note what is left out."""
    texts: list[str] = []
    for where, resource in _entries(bundle, "Condition", "prefetch.conditions", notes):
        condition = _read("Condition", resource, where)
        _check_subject(condition, patient_id, where)
        statuses = _statuses(condition.clinicalStatus) | _statuses(condition.verificationStatus)
        if not statuses & NOT_HAD:
            texts.append(_diagnosis(condition.code, index))
    named = [text for text in dict.fromkeys(texts) if text]
    if "" in texts:
        notes.append(f"{texts.count('')} conditions without a text were not read.")
    if len(named) > MOST_DIAGNOSES:
        notes.append(f"{len(named) - MOST_DIAGNOSES} conditions beyond the first were not read.")
    return named[:MOST_DIAGNOSES]


def _orders(
    bundles: Sequence[tuple[str, Any]], patient_id: str, notes: list[str]
) -> tuple[frozenset[str], ...]:
    """Return the ingredients of each order in force, each once; note what has no drug's text."""
    ordered: list[frozenset[str]] = []
    nameless = 0
    for place, bundle in bundles:
        for where, resource in _entries(bundle, "MedicationRequest", place, notes):
            order = _read("MedicationRequest", resource, where)
            _check_subject(order, patient_id, where)
            _check_code(order.status, ORDER_STATUSES, f"{where}: status")
            if order.status in IN_FORCE and not order.doNotPerform:
                drugs = _drugs(order)
                nameless += not drugs
                ordered += drugs
    if nameless:
        notes.append(f"{nameless} orders without a drug's text were not read.")
    return tuple(dict.fromkeys(ordered))


def _read(kind: str, resource: Any, place: str) -> Any:
    """Validate one resource."""
    from fhir.resources.R4B import get_fhir_model_class

    if not isinstance(resource, dict) or resource.get("resourceType") != kind:
        raise BadResource(f"{place}: it is no {kind}")
    try:
        return get_fhir_model_class(kind).model_validate(resource)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        fields = [part for part in map(str, first["loc"]) if _FIELD.fullmatch(part)]
        reason = {"extra_forbidden": "is no field of R4"}.get(first["type"], "is not as in R4")
        if "missing" in first["type"]:
            reason = "is required"
        raise BadResource(f"{place}: {'.'.join(fields) or 'it'} {reason}") from None
    except RecursionError:
        raise BadResource(f"{place}: it is nested too deeply") from None
    except LookupError:
        # Of a contained resource whose type the validator does not know.
        raise BadResource(f"{place}: it is not as in R4") from None


def _entries(
    bundle: Any, kind: str, place: str, notes: list[str]
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield a Bundle's resources of one kind, each with its place."""
    if bundle is None:
        return
    if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle":
        # Another server's failure comes as an OperationOutcome.
        error = Missing if _kind(bundle) == "OperationOutcome" else BadResource
        raise error(f"{place}: it is no Bundle")
    entries = bundle.get("entry", [])
    if not isinstance(entries, list):
        raise BadResource(f"{place}: entry is not as in R4")
    if len(entries) > MOST_ENTRIES:
        raise BadResource(f"{place} has more than {MOST_ENTRIES} entries")
    links = bundle.get("link") if isinstance(bundle.get("link"), list) else []
    if any(isinstance(link, dict) and link.get("relation") == "next" for link in links or ()):
        notes.append(f"{place} came in pages: only the first was read.")
    for number, entry in enumerate(entries):
        where = f"{place}.entry[{number}].resource"
        resource = entry.get("resource") if isinstance(entry, dict) else None
        if not isinstance(resource, dict) or not isinstance(resource.get("resourceType"), str):
            raise BadResource(f"{where}: it is no resource")
        if resource["resourceType"] == kind:
            yield where, resource


def _kind(resource: Any) -> str:
    return str(resource.get("resourceType")) if isinstance(resource, dict) else ""


def _check_subject(resource: Any, patient_id: str, place: str) -> None:
    # The validator lets a required element be null.
    reference = str(resource.subject.reference or "") if resource.subject else ""
    if reference.rsplit("/", 2)[-2:] != ["Patient", patient_id]:
        raise BadResource(f"{place}: subject is not the patient of context.patientId")


def _check_code(value: object, allowed: Collection[object], place: str) -> None:
    """Check what R4 has a closed list for, which the validator leaves open."""
    if value not in allowed:
        raise BadResource(f"{place} is not as in R4")


def _statuses(concept: Any) -> set[str]:
    return {str(coding.code) for coding in (concept.coding if concept else None) or ()}


def _diagnosis(concept: Any, index: DiagnosisIndex) -> str:
    """Return a known code, else the text that people read; empty where there is none."""
    codings = (concept.coding if concept else None) or ()
    for coding in codings:
        version = ICD_SYSTEMS.get(str(coding.system))
        found = index.read(f"{version}:{str(coding.code).replace('.', '').upper()}")
        if version and found.code:
            return found.code
    texts = [concept.text if concept else None, *(coding.display for coding in codings)]
    return next((str(text) for text in texts if text), "")


def _drugs(order: Any) -> list[frozenset[str]]:
    concept, reference = order.medicationCodeableConcept, order.medicationReference
    texts = [reference.display if reference else None]
    if concept:
        texts += [concept.text, *(coding.display for coding in concept.coding or ())]
    return [ingredients(str(text)) for text in texts if text]
