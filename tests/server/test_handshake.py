"""Hostile or broken handshakes against the real server app.

With ``federation.mismatch = "refuse"`` whatever stands in one leaves that hospital out, and the
result is that of the others alone.
"""

import pytest
from tampering import in_handshake, silent

import client.app
from common.choice import FASTEST, Choice
from common.errors import RunFailed
from common.wire.handshake import check_handshake

HOSTILE = 1
NAME = "hospital-2"


FOREIGN = {
    "of as text": ({"of": "three"}, "'of' is not an integer"),
    "of nobody": ({"of": 0}, "'of' is not an integer"),
    "another of": ({"of": 5}, "it counts 5 hospitals, the federation has 3"),
    "samples as text": ({"train-samples": "many"}, "'train-samples' is not an integer"),
    "samples below zero": ({"train-samples": -4}, "'train-samples' is not an integer"),
    "samples in part": ({"samples": 1.5}, "'samples' is not an integer"),
    "samples as a truth": ({"samples": True}, "'samples' is not an integer"),
    "of as a truth": ({"of": True}, "'of' is not an integer"),
    "a digest that is none": ({"a-sha256": 7}, "'a-sha256' is not a sha256"),
    "a reason of its own": ({"dtype-reason": "the processor is"}, "'dtype-reason' is not one"),
    "another reason": ({"attention-reason": "asked  for"}, "'attention-reason' is not one"),
    "a dtype of its own": ({"dtype": "fp33"}, "'dtype' is not one"),
    "a kernel of its own": ({"attention": ["sdpa"]}, "'attention' is not a scalar"),
    "a device of its own": ({"device": "cuda:4711"}, "'device' is not a device"),
}
NAMELESS = {
    "no name": {"hospital": ""},
    "a blank name": {"hospital": " "},
    "a path": {"hospital": "../hospital-1"},
    "a number": {"hospital": 2},
}


@pytest.fixture(scope="module")
def others_sha():
    return {}


def without_the_hospital(tiny_config, in_process, cache):
    """The run in which the hospital answers no train message; once per module."""
    if "sha" not in cache:
        cache["sha"] = in_process(
            tiny_config(federation__timeout_seconds=0.2), tamper={HOSTILE: silent("train")}
        ).sha
    return cache["sha"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FOREIGN, *NAMELESS])
def test_hostile_handshake_is_refused(kind, tiny_config, in_process, others_sha):
    """Whatever stands in it: the hospital is left out, and the run is that of the others."""
    facts, reason = FOREIGN.get(kind) or (NAMELESS[kind], "'hospital' is not a name")
    config = tiny_config(federation__mismatch="refuse")
    done = in_process(config, tamper={HOSTILE: in_handshake(**facts)})
    ((at, name, text),) = done.refused()
    assert (at, name) == (0, NAME if kind in FOREIGN else "node 107")
    assert text.startswith(f"{name}: ")
    assert reason in text
    assert done.sha == without_the_hospital(tiny_config, in_process, others_sha)


def test_what_torch_says_of_a_kernel_stays_in_the_hospital(tiny_config, in_process, monkeypatch):
    config = tiny_config(federation__rounds=1)
    session = client.app.worker().session(config)
    words = f"{FASTEST} (cudnn: tried, and refused (No engine at 0x7f))"
    monkeypatch.setattr(session, "attention", Choice(session.attention.value, words))
    done = in_process(config)
    assert done.refused() == []
    assert done.run.read_json("summary.json")["attention"]["reason"] == FASTEST


def test_node_that_claims_another_s_name_is_refused(tiny_config, in_process, others_sha):
    """It is no third hospital: whoever wants three waits for the one that it should be."""
    config = tiny_config(federation__mismatch="refuse", federation__min_hospitals=2)
    done = in_process(config, tamper={HOSTILE: in_handshake(hospital="hospital-1")})
    ((at, name, text),) = done.refused()
    assert (at, name) == (0, "hospital-1")
    assert "two nodes call themselves hospital-1" in text
    assert done.sha == without_the_hospital(tiny_config, in_process, others_sha)
    patient = tiny_config(federation__mismatch="refuse", federation__timeout_seconds=0.6)
    with pytest.raises(RunFailed, match="2 of 3 hospitals are connected"):
        in_process(patient, tamper={HOSTILE: in_handshake(hospital="hospital-1")})


@pytest.mark.parametrize("claim", ["hospital-1", "stranger", "hospital 4"])
def test_surplus_node_is_not_counted(claim, tiny_config, in_process):
    """Three hospitals by all accounts and four nodes: a round needs three of three."""
    three = {index: in_handshake(of=3) for index in range(3)}
    fourth = in_handshake(of=3, hospital=claim, **{"source-sha256": "e" * 64})
    config = tiny_config(
        federation__hospitals=4,
        federation__rounds=1,
        federation__quorum=1.0,
        federation__mismatch="refuse",
        federation__timeout_seconds=0.6,
    )
    done = in_process(config, tamper={**three, 3: fourth})
    assert len(done.refused()) == 1
    assert len(done.run.metrics("steps")) == 3


def test_hospitals_that_disagree_on_their_number_stop_the_run(tiny_config, in_process):
    with pytest.raises(RunFailed, match=r"disagree on how many they are: \[3, 5\]"):
        in_process(tiny_config(), tamper={HOSTILE: in_handshake(of=5)})


def test_late_hospital_that_counts_otherwise_is_refused(tiny_config, in_process):
    config = tiny_config(federation__min_hospitals=2)
    done = in_process(
        config,
        online=lambda i, seen: i != HOSTILE or seen >= 1,
        tamper={HOSTILE: in_handshake(of=5)},
    )
    assert [(at, name) for at, name, _ in done.refused()] == [(2, NAME)]


@pytest.mark.slow
def test_hospital_that_claims_too_few_samples_does_not_end_the_run(tiny_config, in_process):
    """With epochs the wait and the steps that are due come from the samples that it tells."""
    config = tiny_config(train__epochs=1.0)
    lying = in_process(config, tamper={HOSTILE: in_handshake(**{"train-samples": 1})})
    assert [(at, name) for at, name, _ in lying.refused()] == [(1, NAME), (2, NAME)]
    assert all("too few training samples" in text for _, _, text in lying.refused())
    assert in_process(config).refused() == []


def read_back(facts):
    return check_handshake(facts, private=False).model_dump(by_alias=True, exclude_unset=True)


def test_honest_handshake_is_taken_as_it_is(tiny_config, in_process):
    done = in_process(tiny_config(federation__rounds=1))
    sent = [dict(message.content["config"]) for _, message in done.grid.wire("up")[:3]]
    assert len(sent) == 3
    assert [read_back(facts) for facts in sent] == sent
