"""The training loop against torch.optim on PEFT's model, and against itself cut in pieces."""

import copy
import hashlib
import math

import peft
import pytest
import torch
from plain_model import plain_loss
from privacy_fixtures import random_samples
from transformers import LlamaForCausalLM

from common.config import TrainConfig
from common.errors import RunFailed, UserError
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.backbone.tiny import tiny_config
from common.model.session import open_session
from common.text.batches import pack
from common.training import gradients
from common.training.gradients import BatchGradient, StepLoss
from common.training.loop import train, validation_loss
from common.training.optimiser import TrainState
from common.training.schedule import batch_order, learning_rate

SPEC = AdapterSpec(rank=4, alpha=8.0, seed=3)


def dataset(count=11):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 40, (count,), generator=generator).tolist()
    return random_samples(lengths, seed=generator)


def opened(dtype="fp32", spec=SPEC):
    return open_session(resolve_backbone("tiny"), spec, device="cpu", dtype=dtype)


def run(config, *, cuts=(7,), session=None, through_tensors=False, total=7):
    session = session or opened()
    state = TrainState()
    reports = []
    for steps in cuts:
        train(
            session,
            dataset(),
            config,
            state,
            steps=steps,
            schedule_steps=total,
            stream="hospital-1",
            on_step=reports.append,
        )
        if through_tensors:
            saved = session.adapter.state()
            state = TrainState.from_tensors(state.to_tensors())
            session = opened(spec=session.adapter.spec)
            session.adapter.load(saved)
    return session, state, reports


def peft_trajectory(config, total=7, mode="fa-lora"):
    """torch.optim on PEFT's parameters, one padded-free sample at a time, the loss by hand."""
    session = opened()
    base = LlamaForCausalLM(tiny_config())
    weights = {k: v for k, v in session.model.state_dict().items() if not k.endswith("lora_B")}
    base.load_state_dict(weights)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    parameters = dict(model.named_parameters())
    trained = {}
    for module in session.adapter.modules:
        prefix = f"base_model.model.{module.key}."
        a = parameters[prefix + "lora_A.default.weight"]
        a.data.copy_(module.lora_A)
        a.requires_grad_(mode == "lora")
        trained[module.key + ".lora_B"] = parameters[prefix + "lora_B.default.weight"]
        if mode == "lora":
            trained[module.key + ".lora_A"] = a
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            trained.values(),
            lr=1.0,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(
            trained.values(),
            lr=1.0,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
    samples = dataset()
    count = config.batch_size * config.accumulation
    losses = []
    for step in range(total):
        batch = [
            samples[i]
            for i in batch_order(config.seed, "hospital-1", len(samples), step * count, count)
        ]
        tokens = sum(sample.label_tokens for sample in batch)
        optimizer.zero_grad()
        loss_sum = 0.0
        for sample in batch:
            ids = torch.tensor([sample.input_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            start = sample.answer_start
            loss = torch.nn.functional.cross_entropy(
                logits[start - 1 : -1], ids[0, start:], reduction="sum"
            )
            (loss / tokens).backward()
            loss_sum += float(loss)
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total)
        optimizer.step()
        losses.append(loss_sum / tokens)
    return {key: value.detach() for key, value in trained.items()}, losses


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(learning_rate=0.5, batch_size=3),
        TrainConfig(learning_rate=0.2, momentum=0.9, weight_decay=0.1, batch_size=2),
        TrainConfig(optimizer="adamw", learning_rate=0.01, schedule="cosine", warmup_steps=2),
        TrainConfig(
            optimizer="adamw",
            learning_rate=0.01,
            schedule="linear",
            weight_decay=0.1,
            batch_size=2,
            accumulation=3,
            max_grad_norm=0.05,
        ),
    ],
    ids=["sgd", "momentum", "adamw-cosine", "adamw-accumulated-clipped"],
)
def test_trajectory_equals_torch_optim_on_pefts_model(config):
    session, _, reports = run(config)
    expected, losses = peft_trajectory(config)
    moved = torch.cat([expected[key].flatten() for key in session.adapter.shapes])
    difference = (session.adapter.flat - moved).norm() / moved.norm()
    assert moved.norm() > 1e-3
    assert difference < 2e-4  # fp32 noise through Adam's division in seven steps
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-5)


def test_mode_lora_trains_a_as_well():
    config = TrainConfig(learning_rate=0.5, batch_size=3)
    spec = AdapterSpec(rank=4, alpha=8.0, seed=3, mode="lora")
    session, _, _ = run(config, session=opened(spec=spec))
    expected, _ = peft_trajectory(config, mode="lora")
    for key, value in session.adapter.state().items():
        torch.testing.assert_close(torch.from_numpy(value), expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("through_tensors", [False, True])
def test_cut_in_rounds_or_resumed_equals_uninterrupted_bit_for_bit(optimizer, through_tensors):
    config = TrainConfig(
        optimizer=optimizer, learning_rate=0.01, momentum=0.9, schedule="cosine", warmup_steps=1
    )
    whole, state, _ = run(config)
    pieces, cut_state, _ = run(config, cuts=(2, 1, 4), through_tensors=through_tensors)
    assert state.step == cut_state.step == 7
    assert torch.equal(whole.adapter.flat, pieces.adapter.flat)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_same_seed_same_b_other_seed_other_b(dtype):
    def b_hash(seed):
        session, _, _ = run(TrainConfig(learning_rate=0.1, seed=seed), session=opened(dtype))
        return hashlib.sha256(session.adapter.flat.numpy().tobytes()).hexdigest()

    assert b_hash(1) == b_hash(1)
    assert b_hash(1) != b_hash(2)


def test_accumulation_is_the_same_step_as_one_large_batch():
    large, _, _ = run(TrainConfig(learning_rate=0.5, batch_size=6))
    small, _, _ = run(TrainConfig(learning_rate=0.5, batch_size=2, accumulation=3))
    difference = (large.adapter.flat - small.adapter.flat).norm() / large.adapter.flat.norm()
    assert difference < 1e-5


def test_a_step_has_its_own_batch_whatever_step_was_before():
    session, config = opened(), TrainConfig(batch_size=2, accumulation=2)
    one = BatchGradient(dataset(), config, "north")
    for step in (0, 1, 5, 5, 2):
        told = one(session, step)
        gradient = session.adapter.flat_grad.clone()
        assert BatchGradient(dataset(), config, "north")(session, step) == told
        assert torch.equal(session.adapter.flat_grad, gradient)


def test_the_next_step_is_packed_before_the_sums_of_this_one_are_waited_for(monkeypatch):
    done = []
    backward = gradients._backward
    monkeypatch.setattr(gradients, "pack", lambda samples: done.append("pack") or pack(samples))
    monkeypatch.setattr(gradients, "_backward", lambda *args: done.append("run") or backward(*args))
    monkeypatch.setattr(gradients.math, "fsum", lambda sums: done.append("wait") or sum(sums))
    source, session = BatchGradient(dataset(), TrainConfig(batch_size=2), "north"), opened()
    for step in range(2):
        source(session, step)
    assert done == ["pack", "run", "pack", "wait", "run", "pack", "wait"]


class Unreadable:
    """A sample that cannot be had, as one that is encoded only when it is asked for."""

    def in_epoch(self, epoch):
        raise LookupError("no such sample")


def test_a_sample_that_cannot_be_packed_spoils_no_step_before_its_own():
    """Two a step: the fourth step has one that cannot be had, and the three before it are whole."""
    session, state, good = opened(), TrainState(), dataset()
    config, reports = TrainConfig(batch_size=2, learning_rate=0.5), []
    broken = 3
    (place,) = batch_order(config.seed, "x", len(good), 2 * broken, 1)
    data = [Unreadable() if at == place else one for at, one in enumerate(good)]
    arguments = {"schedule_steps": 9, "stream": "x"}
    with pytest.raises(LookupError, match="no such sample"):
        train(session, data, config, state, steps=9, on_step=reports.append, **arguments)
    plain, plain_state, told = opened(), TrainState(), []
    train(plain, good, config, plain_state, steps=broken, on_step=told.append, **arguments)
    assert state.step == plain_state.step == broken
    assert [one.loss for one in reports] == [one.loss for one in told]
    assert torch.equal(session.adapter.flat, plain.adapter.flat)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    session, state = opened(), TrainState()
    config = TrainConfig(optimizer="adamw", learning_rate=0.01)
    arguments = {"schedule_steps": 9, "stream": "x"}
    train(session, dataset(), config, state, steps=2, **arguments)
    before, kept = session.adapter.flat.clone(), copy.deepcopy(state)
    norm = session.model.model.norm.weight
    with torch.no_grad():
        norm[0] = math.nan
    with pytest.raises(RunFailed, match="not finite"):
        train(session, dataset(), config, state, steps=2, **arguments)
    assert torch.equal(session.adapter.flat, before)
    assert state.step == kept.step == 2
    assert all(torch.equal(state.optimizer[k], kept.optimizer[k]) for k in kept.optimizer)


def test_a_gradient_that_is_not_finite_stops_even_if_the_loss_is_withheld():
    def broken(session, step):
        session.adapter.flat_grad.fill_(math.inf)
        return StepLoss(None, 1, 1)

    session = opened()
    with pytest.raises(RunFailed, match="not finite"):
        train(
            session,
            [],
            TrainConfig(),
            TrainState(),
            steps=1,
            schedule_steps=1,
            stream="x",
            source=broken,
        )
    assert session.adapter.flat.abs().max() == 0


def test_training_lowers_the_validation_loss_of_what_it_saw():
    session = opened()
    before = validation_loss(session, dataset())
    state = TrainState()
    config = TrainConfig(optimizer="adamw", learning_rate=0.02)
    metrics = train(
        session, dataset(), config, state, steps=15, schedule_steps=15, stream="hospital-1"
    )
    after = validation_loss(session, dataset())
    assert before.tokens == after.tokens == sum(s.label_tokens for s in dataset())
    assert after.mean < before.mean - 0.1
    assert metrics.loss is not None
    assert after.mean < metrics.loss.mean < before.mean


@pytest.mark.parametrize("pack_tokens", [1, 60, 10_000])
def test_validation_loss_does_not_depend_on_the_packing(pack_tokens):
    session = opened()
    session.adapter.flat.add_(0.05)
    reference = 0.0
    for sample in dataset():
        reference += float(plain_loss(session, sample, "sum"))
    found = validation_loss(session, dataset(), pack_tokens=pack_tokens)
    assert found.loss_sum == pytest.approx(reference, rel=1e-5)
    assert validation_loss(session, []).tokens == 0


def test_no_samples_is_the_users_to_mend():
    with pytest.raises(UserError, match="no training samples"):
        train(opened(), [], TrainConfig(), TrainState(), steps=1, schedule_steps=1, stream="x")


def test_order_is_a_pure_function_of_place_and_stream():
    order = batch_order(4, "a", 7, 0, 70)
    assert all(sorted(order[i : i + 7]) == list(range(7)) for i in range(0, 70, 7))
    assert [batch_order(4, "a", 7, step * 3, 3) for step in range(10)] == [
        order[step * 3 : step * 3 + 3] for step in range(10)
    ]
    assert batch_order(4, "b", 7, 0, 70) != order
    assert batch_order(5, "a", 7, 0, 70) != order


def test_schedules_against_transformers():
    from transformers import get_scheduler

    for schedule, warmup in (("constant", 0), ("linear", 0), ("linear", 3), ("cosine", 4)):
        config = TrainConfig(learning_rate=0.3, schedule=schedule, warmup_steps=warmup)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        theirs = get_scheduler(schedule, optimizer, warmup, 20)
        for step in range(20):
            # transformers warms up from 0 (its first step does nothing); ours from lr / warmup.
            if step >= warmup:
                assert learning_rate(config, step, 20) == pytest.approx(theirs.get_last_lr()[0])
            else:
                assert learning_rate(config, step, 20) == pytest.approx(0.3 * (step + 1) / warmup)
            optimizer.step()
            theirs.step()
