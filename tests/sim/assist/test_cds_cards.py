"""CDS Hooks: what the cards say of a patient, of orders and of interactions."""

from dataclasses import replace

import pytest
from cds_replies import call, cards
from cds_requests import TITLES, bundle, condition, order, order_select, patient_view
from fastapi import FastAPI
from fastapi.testclient import TestClient

from common.evaluation.high_priority import warned_of
from sim.assist.cds_hooks import cds_routes

pytest.importorskip("fhir.resources.R4B")


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


@pytest.mark.parametrize("in_format", [True, False])
def test_a_card_says_what_no_epsilon_covers(client, model, in_format):
    listed = model.list_of("Furosemide", in_format=in_format)
    model.answer = replace(listed, uncovered="no epsilon covers this list")
    (card,) = cards(call(client, patient_view()))
    assert "\n\nno epsilon covers this list\n\n" in card["detail"]


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


def test_interactions_with_a_suggested_drug_are_a_warning(model, tmp_path):
    """Of three pairs: one is suggested, one is with an order, one is among the orders alone."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "drug_a,drug_b\naspirin,furosemide\nwarfarin,aspirin\nwarfarin,digoxin\n", "utf-8"
    )
    app = FastAPI()
    model.interactions = warned_of(str(pairs))
    app.include_router(cds_routes(model))
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

    def shown(file):
        model.interactions = warned_of(file)
        app = FastAPI()
        app.include_router(cds_routes(model))
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
    assert shown("") == {"High-priority interactions with suggested drugs: 1": [of_the_list]}
    pairs = tmp_path / "pairs.csv"
    text = "Drug_A,Drug_B,Level\nWarfarin,Aspirin,Major\nWarfarin,Senna,Minor\n"
    pairs.write_text(text, "utf-8")
    assert shown(str(pairs)) == {
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
