"""Orders of the drugs in training: what changes, what does not, and what they depend on."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from common.config import OWN_TEXT, Config, DataConfig, PrivacyConfig, TrainConfig
from common.data.partition import Hospital
from common.data.samples import Admission
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import Session, open_session
from common.privacy.mechanism import gradients as private
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.plan import PrivacyPlan
from common.text.batches import encode
from common.text.drug_order import WRITTEN_OF_A_SET
from common.text.prompts import parse_answer
from common.training import gradients as plain
from common.training.hospital_data import encode_hospital
from common.training.loop import train, validation_loss
from common.training.optimiser import TrainState
from common.training.schedule import batch_order

DRUGS = ("Senna", "insulin", "Aspirin", "Heparin", "Docusate")


def admission(number, drugs=DRUGS):
    return Admission(
        patient=number,
        admission=number,
        sex="F",
        age=60,
        diagnoses=(f"Sepsis {number}",),
        drugs=drugs,
    )


ADMISSIONS = tuple(admission(number) for number in range(6))
HOSPITAL = Hospital(name="north", train=ADMISSIONS, validation=ADMISSIONS[:2], test=())


@pytest.fixture(scope="module")
def session():
    return open_session(resolve_backbone("tiny"), AdapterSpec(rank=4), device="cpu", dtype="fp32")


def config(order, **train):
    return Config(
        data=DataConfig(drug_order=order),
        train=TrainConfig(
            **{"max_length": 512, "batch_size": 4, "optimizer": "adamw", "learning_rate": 0.01}
            | train
        ),
    )


def samples(session, order, hospital=HOSPITAL, **train):
    return encode_hospital(hospital, session, config(order, **train)).train


def drugs_of(session, sample, epoch=0):
    seen = sample.in_epoch(epoch)
    assert seen.input_ids[-1] == session.tokenizer.eos_token_id
    return parse_answer(session.tokenizer.decode(seen.input_ids[seen.answer_start : -1]))


def test_first_start_is_what_it_was(session):
    expected = [
        encode(one, session.tokenizer, text=OWN_TEXT, max_length_tokens=512) for one in ADMISSIONS
    ]
    found = samples(session, "first-start")
    assert list(found) == expected
    assert [one.in_epoch(3) for one in found] == expected


def test_by_name_is_the_alphabet_whatever_the_case(session):
    for one in samples(session, "name"):
        assert drugs_of(session, one) == ["Aspirin", "Docusate", "Heparin", "insulin", "Senna"]


def test_shuffled_changes_the_order_alone(session):
    for place, one in enumerate(samples(session, "shuffled")):
        for epoch in range(4):
            seen = one.in_epoch(epoch)
            assert sorted(drugs_of(session, one, epoch)) == sorted(DRUGS)
            assert seen.input_ids[: seen.answer_start] == one.input_ids[: one.answer_start]
            assert seen.unit == ADMISSIONS[place].patient


def test_an_order_depends_on_seed_hospital_place_and_epoch(session):
    def orders(found):
        return [tuple(drugs_of(session, one, e)) for one in found for e in range(8)]

    base = orders(samples(session, "shuffled"))
    assert base == orders(samples(session, "shuffled"))
    assert len(set(base)) > 30  # of 48, among 120 orders
    assert base != orders(samples(session, "shuffled", seed=1))
    assert base != orders(samples(session, "shuffled", replace(HOSPITAL, name="south")))


def test_every_drug_comes_first_equally_often(session):
    (one, *_) = samples(session, "shuffled")
    first = Counter(drugs_of(session, one, epoch)[0] for epoch in range(400))
    assert set(first) == set(DRUGS)
    # 80 each; five standard deviations are 40.
    assert all(abs(count - 80) < 40 for count in first.values())


def test_what_is_validated_stays_in_the_order_of_the_stay(session):
    found = encode_hospital(HOSPITAL, session, config("shuffled")).validation
    expected = [
        encode(one, session.tokenizer, text=OWN_TEXT, max_length_tokens=512)
        for one in ADMISSIONS[:2]
    ]
    assert list(found) == expected
    assert [one.in_epoch(5) for one in found] == expected


def test_whole_drugs_are_dropped_from_the_end_of_each_order(session):
    drugs = tuple(f"Drug {number:02d} {'abc' * (number % 4)}" for number in range(40))
    many = replace(HOSPITAL, train=(admission(1, drugs),), validation=())
    (one,) = samples(session, "shuffled", many, max_length=4096)
    (tight,) = samples(session, "shuffled", many, max_length=len(one.input_ids) - 30)
    for epoch in range(4):
        kept = drugs_of(session, tight, epoch)
        assert tight.in_epoch(epoch).dropped_drugs == len(drugs) - len(kept) > 0
        assert kept == drugs_of(session, one, epoch)[: len(kept)]


def test_as_a_set_any_drug_may_come_first_and_a_few_are_written(session):
    """Against the lists' own texts: labels where the first drug begins, and nowhere else."""
    tokenizer = session.tokenizer
    head = tokenizer("Drugs:\n-", add_special_tokens=False)["input_ids"]
    begins = {
        tokenizer(f"Drugs:\n- {drug}", add_special_tokens=False)["input_ids"][len(head)]
        for drug in DRUGS
    }
    few = admission(9, DRUGS[:3])
    hospital = replace(HOSPITAL, train=(*ADMISSIONS, few))
    for one, source in zip(samples(session, "set", hospital), hospital.train, strict=True):
        orders = set()
        for epoch in range(4):
            seen = one.in_epoch(epoch)
            assert seen.input_ids[: seen.answer_start] == one.input_ids[: one.answer_start]
            text = tokenizer.decode(seen.input_ids[seen.answer_start :])
            written = parse_answer(text.removesuffix(tokenizer.eos_token))
            orders.add(tuple(written))
            assert len(written) == len(set(written)) == min(WRITTEN_OF_A_SET, len(source.drugs))
            assert set(written) <= set(source.drugs)
            # Only a list that is whole has an end.
            assert (seen.input_ids[-1] == tokenizer.eos_token_id) == (source is few)
            labels = list(seen.labels())
            first = seen.answer_start + len(head) - 1
            there = [label for place, label in labels if place == first]
            assert len(there) == len(source.drugs)
            assert set(there) == begins if source is not few else set(there) <= begins
            hard = [(place, label) for place, label in labels if place != first]
            assert hard == [
                (place - 1, seen.input_ids[place])
                for place in range(seen.answer_start, len(seen.input_ids))
                if place != first + 1
            ]
            assert seen.label_tokens == len(labels)
        assert len(orders) > 1


def test_a_set_s_loss_is_the_mean_over_all_first_drugs(session):
    """One pass with all labels is as many passes as drugs, each with its own first drug."""
    (one, *_) = samples(session, "set")
    seen = one.in_epoch(0)
    noise = torch.randn(session.adapter.flat.shape, generator=torch.Generator().manual_seed(0))
    session.adapter.flat.copy_(0.3 * noise)
    at_once = validation_loss(session, [seen])
    with torch.no_grad():
        logits = session.model(input_ids=torch.tensor([seen.input_ids]), use_cache=False).logits
    logs = logits[0].double().log_softmax(-1)
    by_hand = -sum(float(logs[place, label]) for place, label in seen.labels())
    session.adapter.flat.zero_()
    assert at_once.tokens == seen.label_tokens
    assert at_once.loss_sum == pytest.approx(by_hand, rel=1e-5)


def test_a_set_whose_names_do_not_fit_keeps_as_many_labels_as_it_counts(session):
    """Also where the first name alone is too long, and no list that is cut has an end."""
    long = "Xyloglucan " * 25
    hospital = replace(
        HOSPITAL, train=(admission(1, (f"{long}A", f"{long}B", "Senna", "Aspirin")),), validation=()
    )
    (one,) = samples(session, "set", hospital, max_length=256)
    written = set()
    for epoch in range(8):
        seen = one.in_epoch(epoch)
        assert seen.dropped_drugs >= 2
        assert len(list(seen.labels())) == seen.label_tokens
        batch = plain.pack([seen, seen])
        assert len(batch.labels_N) == len(batch.label_segments_N) == 2 * seen.label_tokens
        assert seen.input_ids[-1] != session.tokenizer.eos_token_id
        written.add(4 - seen.dropped_drugs)
    assert {0, 1} <= written


def test_a_shortened_last_layer_gives_a_set_s_states_as_often(session, monkeypatch):
    batch = plain.pack([one.in_epoch(0) for one in samples(session, "set")[:2]])
    assert batch.repeats
    assert not plain.pack(samples(session, "name")[:2]).repeats
    with torch.no_grad():
        expected = session.label_states(batch)
        monkeypatch.setattr(Session, "shortens", True)
        found = session.label_states(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_validated_as_a_set_is_what_is_learnt(session):
    found = encode_hospital(HOSPITAL, session, config("set")).validation
    assert [len(one.set_tokens) for one in found] == [len(DRUGS)] * 2
    assert found == encode_hospital(HOSPITAL, session, config("set")).validation


def test_an_epoch_ends_with_the_data_and_not_with_the_step(session, monkeypatch):
    """Six samples in batches of four: the second step spans two passes."""
    packed = []
    monkeypatch.setattr(plain, "pack", lambda batch: packed.extend(batch) or private.pack(batch))
    found = samples(session, "shuffled")
    settings = config("shuffled").train
    source = plain.BatchGradient(found, settings, "north")
    for step in range(3):
        source(session, step)
    places = batch_order(settings.seed, "north", 6, 0, 12)
    # The fourth step is packed ahead.
    assert packed[:12] == [found[place].in_epoch(turn // 6) for turn, place in enumerate(places)]


def test_a_run_in_pieces_takes_the_same_steps(session):
    def b_after(order, cuts):
        session.adapter.flat.zero_()
        state = TrainState()
        for steps in cuts:
            # Encoded anew, as after a restart.
            found = samples(session, order)
            train(
                session,
                found,
                config(order).train,
                state,
                steps=steps,
                schedule_steps=5,
                stream="north",
            )
        return session.adapter.flat.clone()

    whole = b_after("shuffled", (5,))
    assert torch.equal(whole, b_after("shuffled", (2, 1, 2)))
    assert not torch.equal(whole, b_after("first-start", (5,)))


def test_a_private_step_has_an_order_of_its_own(session, monkeypatch):
    packed = []
    monkeypatch.setattr(private, "pack", lambda batch: packed.append(batch) or plain.pack(batch))
    plan = PrivacyPlan(
        clip_norm=1.0,
        noise_multiplier=1.0,
        sampling_rate=1.0,
        steps=2,
        expected_batch=6,
        max_admissions_per_patient=1,
        delta=1e-3,
    )
    found = samples(session, "shuffled")
    source = private.PrivateGradient(found, plan, NoiseSource(), seed=0, micro_batch=6)
    for step in range(2):
        source(session, step)
    assert packed == [[one.in_epoch(step) for one in found] for step in range(2)]


@pytest.mark.parametrize("order", ["shuffled", "set"])
def test_with_privacy_who_else_is_there_changes_no_order(session, order):
    """Else a patient who leaves would change everybody's gradient after it, beyond the clip."""
    private_config = replace(
        config(order), privacy=PrivacyConfig(noise_multiplier=1.0, unit="patient")
    )
    fewer = replace(HOSPITAL, train=ADMISSIONS[1:])
    whole, rest = (
        encode_hospital(hospital, session, private_config).train for hospital in (HOSPITAL, fewer)
    )
    steps = range(3)
    assert [[one.in_epoch(step) for one in whole[1:]] for step in steps] == [
        [one.in_epoch(step) for one in rest] for step in steps
    ]
    orders = {tuple(one.shuffled(step)) for one in whole for step in steps}
    assert len(orders) > 9  # of 18, among 120
