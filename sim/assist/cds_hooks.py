"""``fedrx assist --cds-hooks``: the suggested list as cards of CDS Hooks 2.0; research only.

Two services, ``patient-view`` and ``order-select`` (https://cds-hooks.hl7.org/2.0), read what the
client prefetches and call nobody: ``fhirServer`` is never asked. Everything is checked before the
model begins, so a bad request is refused at once; while the model answers somebody else, a card
says so at once too, because a client waits for half a second rather than for minutes. Nothing of a
request is logged.
"""

import datetime
import json
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal
from uuid import UUID, uuid4

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.data.icd import DiagnosisIndex
from common.evaluation.high_priority import CITATION
from common.evaluation.interactions import Interaction, Interactions, interacting
from common.files import writable
from sim.assist.chart import BadResource, Chart, Missing, draft_order, is_ordered, read_chart
from sim.assist.patient_form import FormProblems, read_form
from sim.assist.suggest import Assistant, SuggestedDrug, Suggestion

PREFIX = "/cds-services"
LARGEST_BODY_BYTES = 1024 * 1024
NOTICE = "Research only, not for clinical use."
LONGEST_SUMMARY = 139
PATIENT_VIEW, ORDER_SELECT = "patient-view", "order-select"
_PREFETCH = {
    "patient": "Patient/{{context.patientId}}",
    "conditions": "Condition?patient={{context.patientId}}&clinical-status=active",
    "medications": "MedicationRequest?patient={{context.patientId}}&status=active",
}
SERVICES = {
    f"fedrx-{hook}": {
        "hook": hook,
        "title": f"FedRx: {what} ({NOTICE.rstrip('.').lower()})",
        "description": f"{NOTICE} Suggests drugs that hospitals ordered for patients with like "
        f"diagnoses, as draft orders, {less}.",
        "id": f"fedrx-{hook}",
        "prefetch": _PREFETCH,
        "usageRequirements": "Patient and conditions must be prefetched: the service asks no FHIR "
        "server. Adults only; sex female or male.",
    }
    for hook, what, less in (
        (PATIENT_VIEW, "drugs for a patient's diagnoses", "without those that are ordered"),
        (ORDER_SELECT, "drugs beside a draft order", "without those that are ordered or drafted"),
    )
}
_HIGH_PRIORITY = (
    f"Pairs of {CITATION}, a minimum list of 2012, or severe by the file that this service was "
    "given. Dose, route and reason are not looked at."
)
_OTHERS = "By the file that this service was given, which does not call them severe."
_FIELD = re.compile(r"\w{1,40}")
_log = logging.getLogger(__name__)


class Context(BaseModel):
    """What a hook says about where the clinician is."""

    model_config = ConfigDict(extra="ignore", strict=True)

    user_id: str = Field(alias="userId", min_length=1, max_length=200)
    # A FHIR id, because it becomes part of a reference.
    patient_id: str = Field(alias="patientId", pattern=r"^[A-Za-z0-9.-]{1,64}$")


class OrderContext(Context):
    """The context of order-select."""

    selections: list[str]
    draft_orders: dict[str, Any] = Field(alias="draftOrders")


class HookRequest(BaseModel):
    """A request of either hook; what is not read is ignored, as the specification has it."""

    model_config = ConfigDict(extra="ignore")

    hook: Literal["patient-view", "order-select"]
    hook_instance: UUID = Field(alias="hookInstance")
    context: dict[str, Any]
    prefetch: dict[str, Any] | None = None


def cds_routes(
    suggester: Assistant, *, today: Callable[[], datetime.date] = datetime.date.today
) -> APIRouter:
    """Return the routes of discovery and of both services.

    Args:
        suggester: The model.
        today: For a patient's age.
    """
    router, answering = APIRouter(prefix=PREFIX), threading.Lock()

    @router.get("")
    async def discover() -> dict[str, Any]:
        return {"services": list(SERVICES.values())}

    @router.post("/{service}")
    async def serve(service: str, request: Request) -> Response:
        if service not in SERVICES:
            return _refused(404, f"there is no such service; allowed: {', '.join(SERVICES)}")
        body = await request.body()
        try:
            cards = await run_in_threadpool(answer, service, body, suggester, answering, today())
        except Missing as problem:
            return _refused(412, f"{problem}; fix: prefetch {' and '.join(_PREFETCH)}")
        except BadResource as problem:
            return _refused(400, str(problem))
        except Exception as error:
            # A traceback's text may quote the patient.
            _log.error("a CDS service failed: %s", type(error).__name__)
            return _refused(500, f"the service failed: {type(error).__name__}")
        return JSONResponse({"cards": cards})

    return router


def answer(
    service: str,
    body: bytes,
    suggester: Assistant,
    answering: threading.Lock,
    today: datetime.date,
) -> list[dict[str, Any]]:
    """Return the cards of one request.

    Args:
        service: Its id.
        body: JSON as it came.
        suggester: The model.
        answering: Held while it answers a request of these services.
        today: For the patient's age.

    Raises:
        BadResource: in one line without the request's content, before the model begins.
    """
    request, context = read_request(service, body)
    chart = chart_of(request, context, suggester.reference.index, today)
    try:
        patient = read_form(chart.form, suggester.reference.index)
    except FormProblems as problems:
        return [card("No drugs are suggested", [*problems.problems.values(), *chart.notes])]
    free = answering.acquire(blocking=False)
    try:
        if not free or suggester.busy:
            return [card("FedRx is answering another request", ["Ask again in a moment."])]
        suggestion = suggester.suggest(patient)
    finally:
        if free:
            answering.release()
    return cards_of(suggestion, chart, context.patient_id, suggester.interactions)


def read_request(service: str, body: bytes) -> tuple[HookRequest, Context]:
    """Check a request but for the resources in it.

    Raises:
        BadResource: naming the first field that is wrong.
    """
    try:
        content, _ = writable(json.loads(body))
    except (ValueError, RecursionError):
        raise BadResource("the request is no JSON") from None
    request: HookRequest = _checked(HookRequest, content, "")
    if f"fedrx-{request.hook}" != service:
        raise BadResource(f"hook: the service {service} is for {SERVICES[service]['hook']}")
    kind = OrderContext if request.hook == ORDER_SELECT else Context
    return request, _checked(kind, request.context, "context.")


def chart_of(
    request: HookRequest, context: Context, index: DiagnosisIndex, today: datetime.date
) -> Chart:
    """Read the patient's resources, and the draft orders of order-select.

    Raises:
        BadResource: as ``read_chart``; also for a selection that is not among the drafts.
        Missing: where patient or conditions were not prefetched.
    """
    prefetch = request.prefetch or {}
    # null is a query that found nothing; no key, or a failure, is one that was not made.
    for key in ("patient", "conditions"):
        if key not in prefetch or _failed(prefetch[key]):
            raise Missing(f"prefetch.{key} is missing")
    medications = prefetch.get("medications")
    bundles = [("prefetch.medications", None if _failed(medications) else medications)]
    if isinstance(context, OrderContext):
        bundles.append(("context.draftOrders", context.draft_orders))
    chart = read_chart(
        prefetch["patient"],
        prefetch["conditions"],
        bundles,
        patient_id=context.patient_id,
        index=index,
        today=today,
    )
    if isinstance(context, OrderContext):
        drafts = {
            f"{one['resource'].get('resourceType')}/{one['resource'].get('id')}"
            for one in context.draft_orders.get("entry", [])
        }
        if set(context.selections) - drafts:
            raise BadResource("context.selections: one of them is not in context.draftOrders")
    if "medications" not in prefetch or _failed(medications):
        note = "prefetch.medications was not sent: what is ordered already is not known."
        return replace(chart, notes=(*chart.notes, note))
    return chart


def cards_of(
    suggestion: Suggestion, chart: Chart, patient_id: str, interactions: Interactions
) -> list[dict[str, Any]]:
    """Return the cards of one list: a suggestion for each drug that is not ordered yet.

    A card each warns of the high-priority interactions and of the other ones of the user's file,
    as far as a suggested drug is in them.
    """
    own = [suggestion.uncovered] if suggestion.uncovered else []
    if not suggestion.in_format:
        details = [*own, "The model's answer was no drug list."]
        return [card("No drugs are suggested", details)]
    fresh = [drug for drug in suggestion.drugs if not is_ordered(drug.name, chart.ordered)]
    details = [*own, *chart.notes]
    if len(fresh) < len(suggestion.drugs):
        count = len(suggestion.drugs) - len(fresh)
        details.append(f"{count} of {len(suggestion.drugs)} suggested drugs are ordered already.")
    if suggestion.ends:
        details.append(f"Why the list ends there: {_plain(suggestion.ends)}.")
    if suggestion.dropped_diagnoses:
        details.append(f"{suggestion.dropped_diagnoses} diagnoses did not fit and were not read.")
    if not fresh:
        return [card("No further drugs are suggested", details)]
    drugs = "1 drug" if len(fresh) == 1 else f"{len(fresh)} drugs"
    suggestions = [
        {
            "label": drug.name,
            "uuid": str(uuid4()),
            "actions": [
                {
                    "type": "create",
                    "description": f"Draft an order: {drug.name}{evidence(drug)}. {NOTICE}",
                    "resource": draft_order(drug.name, patient_id),
                }
            ],
        }
        for drug in fresh
    ]
    shown = card(f"{drugs} that hospitals ordered for like diagnoses", details)
    cards = [{**shown, "suggestions": suggestions, "selectionBehavior": "any"}]
    new = [drug.name for drug in fresh]
    had = [" and ".join(sorted(order)) for order in chart.ordered]
    found = interacting([*new, *had], interactions)
    return [*cards, *warnings([one for one in found if not {*one[:2]}.isdisjoint(new)])]


def warnings(found: Collection[Interaction]) -> Iterator[dict[str, Any]]:
    """Return a card on interactions of high priority, and one on those that are not."""
    for title, note, chosen in (
        ("High-priority interactions", _HIGH_PRIORITY, [one for one in found if one.high_priority]),
        ("Other interactions", _OTHERS, [one for one in found if not one.high_priority]),
    ):
        lines = [
            f"- {_plain(one.first)} with {_plain(one.second)}"
            + (f" ({_plain(one.high_priority)})" if one.high_priority else "")
            for one in chosen
        ]
        if lines:
            shown = card(f"{title} with suggested drugs: {len(lines)}", ["\n".join(lines), note])
            yield {**shown, "indicator": "warning"}


def evidence(drug: SuggestedDrug) -> str:
    """Return what speaks for a drug, in brackets; empty where nothing is known.

    >>> evidence(SuggestedDrug(name="Furosemide", support=None, confidence=0.514))
    ' (confidence 51%)'
    """
    known = []
    if drug.confidence is not None:
        known.append(f"confidence {drug.confidence:.0%}")
    if drug.support is not None:
        known.append(f"{drug.support.ordered} of {drug.support.similar} similar stays had it")
    return f" ({', '.join(known)})" if known else ""


def card(summary: str, details: list[str]) -> dict[str, Any]:
    """Return a card, which says that it is research; texts of a model or patient are not in it."""
    text = f"{summary} (research only, not for clinical use)"
    assert len(text) <= LONGEST_SUMMARY
    return {
        "uuid": str(uuid4()),
        "summary": text,
        "detail": "\n\n".join([f"**{NOTICE}**", *details]),
        "indicator": "info",
        "source": {"label": f"FedRx. {NOTICE}"},
    }


def _plain(text: str) -> str:
    r"""Return text that Markdown shows as it is.

    >>> _plain("*Drug* <b>")
    '\\*Drug\\* \\<b\\>'
    """
    return re.sub(r"([^\w\s])", r"\\\1", " ".join(text.split()))


def _failed(resource: object) -> bool:
    """Tell whether the client's query failed: then there is an OperationOutcome."""
    return isinstance(resource, dict) and resource.get("resourceType") == "OperationOutcome"


def _checked(model: type[Any], content: object, place: str) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        name = f"{place}{field}" if _FIELD.fullmatch(field) else "the request"
        reason = "is required" if first["type"] == "missing" else "is not as in CDS Hooks 2.0"
        raise BadResource(f"{name} {reason}") from None


def _refused(status: int, line: str) -> Response:
    content: Mapping[str, Any] = {"problems": {"request": line}}
    return JSONResponse(content, status_code=status)
