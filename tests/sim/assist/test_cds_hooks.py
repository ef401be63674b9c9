"""CDS Hooks 2.0: discovery, refusals, and who may ask; requests in the shapes of the examples."""

import json
import logging
import re
import threading

import pytest
from cds_replies import call, cards
from cds_requests import SECRET, TODAY, changed, order_select, patient_view
from fastapi.testclient import TestClient

from common.errors import UserError
from sim.assist.cds_hooks import LARGEST_BODY_BYTES, NOTICE, SERVICES, cds_routes
from sim.assist.chart import require_fhir
from sim.assist.server import PageState, make_app
from sim.process import extras

pytest.importorskip("fhir.resources.R4B")


def test_discovery_has_what_the_specification_requires(client):
    reply = client.get("/cds-services")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    services = reply.json()["services"]
    assert {one["hook"] for one in services} == {"patient-view", "order-select"}
    for one in services:
        assert one["id"] == f"fedrx-{one['hook']}"
        assert one["title"]
        assert NOTICE in one["description"]
        assert {key: value.partition("?")[0] for key, value in one["prefetch"].items()} == {
            "patient": "Patient/{{context.patientId}}",
            "conditions": "Condition",
            "medications": "MedicationRequest",
        }
        tokens = re.findall(r"{{(.*?)}}", json.dumps(one["prefetch"]))
        assert set(tokens) == {"context.patientId"}


CONDITIONS = ("prefetch", "conditions")
FIRST = (*CONDITIONS, "entry", 0, "resource")
DRAFT = ("context", "draftOrders", "entry", 1, "resource")


@pytest.mark.parametrize(
    ("path", "value", "status", "line"),
    [
        (("hook",), "order-sign", 400, "hook is not as in CDS Hooks 2.0"),
        (("hook",), "patient-view", 400, "hook: the service fedrx-order-select is for order-"),
        (("hookInstance",), SECRET, 400, "hookInstance is not as in CDS Hooks 2.0"),
        (("hookInstance",), ..., 400, "hookInstance is required"),
        (("context", "patientId"), ..., 400, "context.patientId is required"),
        (("context", "patientId"), f"../{SECRET}", 400, "context.patientId is not as in CDS"),
        (("context", "userId"), 17, 400, "context.userId is not as in CDS Hooks 2.0"),
        (("context", "draftOrders"), ..., 400, "context.draftOrders is required"),
        (("context", "draftOrders"), [SECRET], 400, "context.draftOrders is not as in CDS"),
        (("context", "draftOrders", "resourceType"), "List", 400, "draftOrders: it is no Bundle"),
        (("context", "selections"), ["MedicationRequest/7"], 400, "context.selections: one of"),
        (("prefetch",), ..., 412, "prefetch.patient is missing; fix: prefetch patient and"),
        ((*CONDITIONS,), ..., 412, "prefetch.conditions is missing"),
        ((*CONDITIONS, "resourceType"), "OperationOutcome", 412, "prefetch.conditions is missing"),
        (("prefetch", "patient", "resourceType"), "Person", 400, "prefetch.patient: it is no Pati"),
        (("prefetch", "patient", "gender"), SECRET, 400, "prefetch.patient: gender is not as in"),
        (("prefetch", "patient", "birthDate"), "1955-13-40", 400, "prefetch.patient: birthDate is"),
        (("prefetch", "patient", "birthdate"), SECRET, 400, "birthdate is no field of R4"),
        (("prefetch", "patient", SECRET), "x", 400, "prefetch.patient: it is no field of R4"),
        (("prefetch", "patient", "id"), "9", 400, "it is not the patient of context.patientId"),
        ((*CONDITIONS, "entry"), SECRET, 400, "prefetch.conditions: entry is not as in R4"),
        ((*CONDITIONS, "entry", 0), SECRET, 400, "entry[0].resource: it is no resource"),
        ((*CONDITIONS, "entry"), [{}] * 1001, 400, "prefetch.conditions has more than 1000 entr"),
        ((*FIRST, "subject"), ..., 400, "entry[0].resource: subject is required"),
        ((*FIRST, "subject", "reference"), "Patient/9", 400, "subject is not the patient of"),
        ((*FIRST, "subject"), None, 400, "subject is not the patient of"),
        ((*FIRST, "contained"), [{"resourceType": SECRET}], 400, "resource: it is not as in R4"),
        ((*FIRST, "code"), SECRET, 400, "entry[0].resource: code is not as in R4"),
        ((*DRAFT, "intent"), ..., 400, "entry[1].resource: intent is required"),
        ((*DRAFT, "status"), SECRET, 400, "entry[1].resource: status is not as in R4"),
        ((*DRAFT, "medicationCodeableConcept"), ..., 400, "entry[1].resource: it is not as in R4"),
        ((*DRAFT, "subject", "reference"), "Group/1288992", 400, "subject is not the patient of"),
    ],
)
def test_what_is_wrong_is_one_line_without_its_content(client, model, path, value, status, line):
    """Each before the model is asked."""
    request = changed(order_select(), path, value)
    reply = call(client, request, "fedrx-order-select")
    assert reply.status_code == status
    (problem,) = reply.json()["problems"].values()
    assert line in problem
    assert "\n" not in problem
    assert SECRET.split()[0] not in reply.text
    assert not model.asked


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 60_000])
def test_what_is_no_request_is_one_line(client, body):
    reply = call(client, body, "fedrx-patient-view")
    assert reply.status_code == 400
    assert len(reply.json()["problems"]) == 1


def test_an_unknown_service_is_named(client):
    reply = call(client, patient_view(), "fedrx-order-sign")
    assert reply.status_code == 404
    assert all(name in reply.text for name in SERVICES)


def test_while_the_model_answers_others_are_told_at_once(client, model):
    """Nobody waits for the model but the one whose list it is: by order of events, not by time."""
    begun, go_on = threading.Event(), threading.Event()
    answer = model.answer

    def slow(request):
        begun.set()
        assert go_on.wait(60)
        return answer

    model.suggest = slow
    first = []
    asking = threading.Thread(target=lambda: first.append(call(client, patient_view())))
    asking.start()
    assert begun.wait(60)
    assert client.get("/cds-services").status_code == 200
    wrong = changed(patient_view(), ("prefetch", "patient", "gender"), "x")
    assert call(client, wrong).status_code == 400
    (card,) = cards(call(client, patient_view()))
    assert card["summary"].startswith("FedRx is answering another request")
    assert "suggestions" not in card
    assert not first
    go_on.set()
    asking.join(60)
    assert cards(first[0])[0]["suggestions"]
    # The page has the same model.
    model.busy = True
    (card,) = cards(call(client, patient_view()))
    assert card["summary"].startswith("FedRx is answering another request")
    model.busy = False
    model.suggest = lambda request: answer
    assert cards(call(client, patient_view()))[0]["suggestions"]


def test_nothing_of_a_patient_is_logged(client, model, caplog, capfd):
    caplog.set_level(logging.DEBUG)

    def fail(request):
        raise ValueError(f"{SECRET} {request}")

    model.suggest = fail
    reply = call(client, patient_view())
    assert (reply.status_code, reply.json()) == (
        500,
        {"problems": {"request": "the service failed: ValueError"}},
    )
    call(client, changed(patient_view(), ("prefetch", "patient", "gender"), SECRET))
    out = capfd.readouterr()
    for text in (caplog.text, out.out, out.err):
        assert "Quux" not in text
        assert "lives alone" not in text
        assert "1288992" not in text
    assert "a CDS service failed: ValueError" in caplog.text


def test_without_the_validator_it_is_one_line(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        require_fhir()
    line = "--cds-hooks needs the package fhir.resources; fix: pip install 'fhir.resources"
    assert str(error.value).startswith(line)


PORT = 8080


@pytest.fixture
def served(model, tmp_path):
    """The page's application with the services in it, and its secret."""
    state = PageState(suggester=model, decisions=tmp_path / "decisions.jsonl", about={})
    services = cds_routes(model, today=lambda: TODAY)
    app = make_app(state, port=PORT, services=services)
    with TestClient(app, base_url=f"http://127.0.0.1:{PORT}") as client:
        yield client, state.secret


def send(served, **headers):
    client, secret = served
    usual = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
    chosen = {k: v for k, v in {**usual, **headers}.items() if v is not None}
    body = json.dumps(patient_view())
    return client.post("/cds-services/fedrx-patient-view", content=body, headers=chosen)


def test_the_services_are_beside_the_page(served, model):
    client, _ = served
    assert client.get("/cds-services").status_code == 200
    reply = send(served)
    assert reply.headers["cache-control"] == "no-store"
    assert cards(reply)[0]["suggestions"]
    assert client.get("/").status_code == 403
    assert send(served, authorization=f"bearer {served[1]}").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": None}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Basic SECRET"}, 401),
        ({"authorization": None, "cookie": f"fedrx-assist-{PORT}=SECRET"}, 401),
        ({"host": "hospital.example:8080"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-length": str(LARGEST_BODY_BYTES + 1)}, 422),
        ({"content-length": None, "transfer-encoding": "chunked"}, 422),
    ],
)
def test_who_may_not_ask_is_refused(served, model, headers, status):
    headers = {
        key: value.replace("SECRET", served[1]) if isinstance(value, str) else value
        for key, value in headers.items()
    }
    client, secret = served
    request = client.build_request(
        "POST", "/cds-services/fedrx-patient-view", content=json.dumps(patient_view())
    )
    usual = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
    for key, value in {**usual, **headers}.items():
        if value is None:
            request.headers.pop(key, None)
        else:
            request.headers[key] = value
    assert client.send(request).status_code == status
    assert not model.asked


def test_a_chart_may_be_longer_than_a_form(served, model):
    request = patient_view()
    request["prefetch"]["conditions"]["entry"] *= 150
    client, secret = served
    body = json.dumps(request).encode()
    assert 64 * 1024 < len(body) < LARGEST_BODY_BYTES
    headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
    reply = client.post("/cds-services/fedrx-patient-view", content=body, headers=headers)
    assert cards(reply)[0]["suggestions"]
    assert client.post("/api/suggest", content=body, headers=headers).status_code == 422
