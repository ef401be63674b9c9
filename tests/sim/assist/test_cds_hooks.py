"""CDS Hooks 2.0: requests in the shapes of the specification's examples, written here by hand."""

import copy
import json
import logging
import re
import threading
from uuid import UUID

import pytest
from cds_requests import (
    SECRET,
    TITLES,
    TODAY,
    bundle,
    condition,
    order,
    order_select,
    patient_view,
)
from fastapi import FastAPI
from fastapi.testclient import TestClient

from common.config import Config, EvaluationConfig
from common.data.icd import Diagnosis, DiagnosisIndex
from common.errors import UserError
from common.evaluation.high_priority import high_priority
from common.evaluation.support import Support
from sim.assist.cds_hooks import LARGEST_BODY_BYTES, NOTICE, SERVICES, cds_routes, routes_of_run
from sim.assist.chart import require_fhir
from sim.assist.server import PageState, make_app
from sim.assist.suggest import ReferenceData, SuggestedDrug, Suggestion
from sim.process import extras

pytest.importorskip("fhir.resources.R4B")


class Stub:
    """Answers everybody with the same list."""

    drugs = ("Furosemide", "Aspirin", "Metoprolol Tartrate")

    def __init__(self):
        rows = [Diagnosis(code=code, title=title) for code, title in TITLES.items()]
        index = DiagnosisIndex(rows, frequency={}, origin="test titles")
        self.reference = ReferenceData(index=index, support=None, note="")
        self.busy = False
        self.asked = []
        self.answer = self.list_of(*self.drugs)

    @staticmethod
    def list_of(*drugs, in_format=True):
        supports = (Support(ordered=3, similar=4), None, None)
        confidences = (0.62, 0.4, None)
        return Suggestion(
            drugs=tuple(
                SuggestedDrug(name=name, support=support, confidence=confidence)
                for name, support, confidence in zip(drugs, supports, confidences, strict=False)
            ),
            in_format=in_format,
            similar=4,
            dropped_diagnoses=0,
            seconds=0.1,
            ends="3 drugs *are* enough",
        )

    def suggest(self, request):
        self.asked.append(request)
        return self.answer


@pytest.fixture
def model():
    return Stub()


@pytest.fixture
def client(model):
    app = FastAPI()
    app.include_router(cds_routes(model, interactions=high_priority(), today=lambda: TODAY))
    with TestClient(app) as asking:
        yield asking


def call(client, request, service=None):
    service = service or f"fedrx-{request['hook']}"
    body = request if isinstance(request, bytes) else json.dumps(request)
    return client.post(f"/cds-services/{service}", content=body)


def check_card(card):
    """What the specification requires of a card, and the notice."""
    from fhir.resources.R4B.medicationrequest import MedicationRequest

    UUID(card["uuid"])
    assert 0 < len(card["summary"]) < 140
    assert card["indicator"] in {"info", "warning", "critical"}
    assert NOTICE in card["source"]["label"]
    assert NOTICE in card["detail"]
    assert "not for clinical use" in card["summary"]
    assert ("suggestions" in card) == ("selectionBehavior" in card)
    for suggestion in card.get("suggestions", []):
        UUID(suggestion["uuid"])
        assert suggestion["label"]
        for action in suggestion["actions"]:
            assert action["type"] == "create"
            assert NOTICE in action["description"]
            MedicationRequest.model_validate(action["resource"])


def cards(reply):
    assert reply.status_code == 200, reply.text
    assert set(reply.json()) == {"cards"}
    for card in reply.json()["cards"]:
        check_card(card)
    return reply.json()["cards"]


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


def test_patient_view_suggests_what_is_not_ordered(client, model):
    (card,) = cards(call(client, patient_view()))
    assert [one["label"] for one in card["suggestions"]] == ["Furosemide", "Aspirin"]
    assert card["selectionBehavior"] == "any"
    assert card["summary"].startswith("2 drugs ")
    assert "1 of 3 suggested drugs are ordered already." in card["detail"]
    first, second = (one["actions"][0] for one in card["suggestions"])
    assert "(confidence 62%, 3 of 4 similar stays had it)" in first["description"]
    assert "(confidence 40%)" in second["description"]
    assert r"Why the list ends there: 3 drugs \*are\* enough." in card["detail"]
    assert first["resource"] == {
        "resourceType": "MedicationRequest",
        "status": "draft",
        "intent": "proposal",
        "medicationCodeableConcept": {"text": "Furosemide"},
        "subject": {"reference": "Patient/1288992"},
    }
    (asked,) = model.asked
    assert (asked.sex, asked.age, asked.height_cm, asked.weight_kg) == ("M", 70, None, None)
    titles = [diagnosis.title for diagnosis in asked.diagnoses]
    expected = [TITLES["10:I509"], "lives alone", TITLES["9:4280"], TITLES["10:I10"]]
    assert titles == expected
    assert asked.codes == ("10:I509", "9:4280", "10:I10")


def test_order_select_leaves_the_drafts_out_too(client, model):
    (card,) = cards(call(client, order_select()))
    assert [one["label"] for one in card["suggestions"]] == ["Aspirin"]
    assert card["summary"].startswith("1 drug ")
    model.answer = model.list_of("furosemide", "metoprolol")
    (card,) = cards(call(client, order_select()))
    assert "suggestions" not in card


def test_orders_that_are_over_or_forbidden_are_not_ordered(client):
    request = patient_view()
    request["prefetch"]["medications"] = bundle(
        order("Furosemide", status="stopped"),
        order("Aspirin", doNotPerform=True),
        {
            **{k: v for k, v in order("").items() if k != "medicationCodeableConcept"},
            "medicationReference": {"reference": "Medication/3", "display": "METOPROLOL 5 MG"},
        },
    )
    (card,) = cards(call(client, request))
    assert [one["label"] for one in card["suggestions"]] == ["Furosemide", "Aspirin"]


def test_what_was_not_read_is_said(client):
    request = patient_view()
    found = request["prefetch"]["conditions"]["entry"]
    found += [{"resource": condition(text=f"problem {n}")} for n in range(50)]
    found += [{"resource": condition(), "search": {"mode": "match"}}]
    request["prefetch"]["conditions"]["link"] = [{"relation": "next", "url": "http://x"}]
    request["prefetch"]["medications"] = {"resourceType": "OperationOutcome"}
    (card,) = cards(call(client, request))
    told = order_select()
    draft = told["context"]["draftOrders"]["entry"][1]["resource"]
    del draft["medicationCodeableConcept"]
    draft["medicationReference"] = {"reference": "#contained"}
    (other, *_) = cards(call(client, told, "fedrx-order-select"))
    assert "1 orders without a drug's text were not read." in other["detail"]
    for line in (
        "14 conditions beyond the first were not read.",
        "1 conditions without a text were not read.",
        "prefetch.conditions came in pages: only the first was read.",
        "prefetch.medications was not sent: what is ordered already is not known.",
    ):
        assert line in card["detail"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gender": "other"}, "female or male"),
        ({"gender": None}, "female or male"),
        ({"birthDate": "2015-01"}, "adults only"),
        ({"birthDate": None}, "adults only"),
    ],
)
def test_a_patient_that_the_model_does_not_know_gets_a_card_that_says_why(
    client, model, change, words
):
    request = patient_view()
    request["prefetch"]["patient"] |= change
    request["prefetch"]["patient"] = {
        key: value for key, value in request["prefetch"]["patient"].items() if value is not None
    }
    (card,) = cards(call(client, request))
    assert "suggestions" not in card
    assert words in card["detail"]
    assert not model.asked


def test_null_is_nothing_found(client, model):
    request = patient_view()
    request["prefetch"] |= {"conditions": None, "medications": None}
    (card,) = cards(call(client, request))
    assert "at least one" in card["detail"]
    request["prefetch"]["patient"] = None
    assert call(client, request).status_code == 412
    assert not model.asked


def changed(request, path, value):
    """A copy with one place changed; a value of ... is removed."""
    request = copy.deepcopy(request)
    place = request
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return request


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


def test_interactions_with_a_suggested_drug_are_a_warning(model, tmp_path):
    """Of three pairs: one is suggested, one is with an order, one is among the orders alone."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "drug_a,drug_b\naspirin,furosemide\nwarfarin,aspirin\nwarfarin,digoxin\n", "utf-8"
    )
    app = FastAPI()
    config = Config(evaluation=EvaluationConfig(interactions=str(pairs)))
    app.include_router(routes_of_run(model, config))
    request = patient_view()
    request["prefetch"]["medications"] = bundle(order("Warfarin 5 mg Tab"), order("Digoxin"))
    with TestClient(app) as client:
        first, second = cards(call(client, request))
        assert [one["label"] for one in first["suggestions"]] == list(model.drugs)
        assert second["indicator"] == "warning"
        assert second["summary"].startswith("Other interactions with suggested drugs: 2 ")
        lines = [line for line in second["detail"].splitlines() if line.startswith("- ")]
        assert lines == ["- Furosemide with Aspirin", "- Aspirin with warfarin"]
        model.answer = model.list_of("Digoxin", "Metoprolol")
        assert len(cards(call(client, request))) == 1


def test_high_priority_interactions_have_a_card_of_their_own(model, tmp_path):
    """The shipped list without a file; with one, its severe pairs too, and the others apart."""
    request = patient_view()
    request["prefetch"]["medications"] = bundle(order("Haloperidol Lactate"), order("Warfarin"))
    model.answer = model.list_of("Ondansetron ODT", "Aspirin", "Senna")

    def shown(config):
        app = FastAPI()
        app.include_router(routes_of_run(model, config))
        with TestClient(app) as client:
            _, *others = cards(call(client, request))
        assert {one["indicator"] for one in others} <= {"warning"}
        return {
            one["summary"].partition(" (")[0]: [
                line for line in one["detail"].splitlines() if line.startswith("- ")
            ]
            for one in others
        }

    of_the_list = r"- Ondansetron ODT with haloperidol (QT\-prolonging agents with one another)"
    assert shown(Config()) == {"High-priority interactions with suggested drugs: 1": [of_the_list]}
    pairs = tmp_path / "pairs.csv"
    text = "Drug_A,Drug_B,Level\nWarfarin,Aspirin,Major\nWarfarin,Senna,Minor\n"
    pairs.write_text(text, "utf-8")
    assert shown(Config(evaluation=EvaluationConfig(interactions=str(pairs)))) == {
        "High-priority interactions with suggested drugs: 2": [
            of_the_list,
            "- Aspirin with warfarin (major in the file of interactions)",
        ],
        "Other interactions with suggested drugs: 1": ["- Senna with warfarin"],
    }


def test_an_answer_that_is_no_list_is_said(client, model):
    model.answer = model.list_of(in_format=False)
    (card,) = cards(call(client, patient_view()))
    assert "no drug list" in card["detail"]


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
    services = cds_routes(model, interactions=high_priority(), today=lambda: TODAY)
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
