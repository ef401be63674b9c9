"""Unit gradients and the private source (specification tests 1, 2, 4, 7 and 8)."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from opacus import GradSampleModule
from plain_model import plain_gradient
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from common.config import TrainConfig
from common.model.backbone.tiny import tiny_model
from common.model.kernels import fused_layer as lean
from common.model.session import Session
from common.privacy.mechanism.gradients import PrivateGradient, private_bytes
from common.privacy.mechanism.noise import NoiseSource
from common.text.batches import Encoded, pack
from common.training.gradients import BatchGradient, StepLoss, add_unit_gradients
from common.training.loop import TrainState, train
from common.training.loss import weighted_cross_entropy

LENGTHS = (17, 5, 33, 8, 12, 21)
UNITS = (1, 2, 1, 3, 1, 2)
PATIENTS = ((0, 2, 4), (1, 5), (3,))


def relative(ours: Tensor, oracle: Tensor) -> float:
    return float((ours.double() - oracle.double()).norm() / oracle.double().norm())


def unit_rows(session: Session, samples: list[Encoded]) -> Tensor:
    out = torch.zeros(len(samples), session.adapter.trainable_parameters)
    add_unit_gradients(session, pack(samples), range(len(samples)), out)
    return out


def batch_mean_rows(session: Session, samples: list[Encoded]) -> Tensor:
    """The mutant: one mean over all tokens of the batch, as transformers' ``labels=`` takes it."""
    batch = pack(samples)
    out = torch.zeros(len(samples), session.adapter.trainable_parameters)
    weights = torch.full((len(batch.labels_N),), len(samples) / len(batch.labels_N))
    with session.adapter.unit_gradients(batch.cu_seqlens, range(len(samples)), out):
        hidden = session.hidden_states(batch)[batch.label_positions_N]
        head = session.model.lm_head.weight
        weighted_cross_entropy(hidden, head, batch.labels_N, weights)[0].backward()
    return out


def agree(session: Session, samples: list[Encoded], rows: Tensor) -> bool:
    return all(
        relative(row, plain_gradient(session, s)) < 1e-6
        for row, s in zip(rows, samples, strict=True)
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unit_gradients_equal_a_loop_of_single_passes(open_tiny, samples_of, attention) -> None:
    session, samples = open_tiny(attention=attention), samples_of(LENGTHS, UNITS)
    assert agree(session, samples, unit_rows(session, samples))
    assert not agree(session, samples, batch_mean_rows(session, samples))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", ["mlp", "half", "all"])
def test_unit_gradients_survive_checkpointing(
    open_tiny, samples_of, monkeypatch, recompute, reentrant
) -> None:
    session, samples = open_tiny(recompute=recompute), samples_of(LENGTHS, UNITS)
    expected = [plain_gradient(session, sample) for sample in samples]
    calls = []

    def watched(function: Callable[..., Any], *inputs: Any, use_reentrant: bool) -> Any:
        def counted(*again: Any) -> Any:
            calls.append(function)
            return function(*again)

        return checkpoint(counted, *inputs, use_reentrant=reentrant)

    monkeypatch.setattr(lean, "checkpoint", watched)
    if reentrant:  # it needs an input that requires a gradient
        session.model.enable_input_require_grads()
    rows = unit_rows(session, samples)
    assert len(calls) == (2 if recompute == "half" else 4)  # of two layers, each run twice
    assert all(relative(row, gold) < 1e-6 for row, gold in zip(rows, expected, strict=True))


def test_unit_gradients_equal_opacus_on_a_padded_batch(open_tiny, samples_of) -> None:
    """Oracle: PEFT's LoRA under Opacus' hooks, right-padded, summed per-sample mean losses."""
    session, samples = open_tiny(), samples_of(LENGTHS, UNITS)
    adapter = session.adapter
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    reference = peft.get_peft_model(tiny_model(), lora)
    named = dict(reference.named_parameters())
    with torch.no_grad():
        for module in adapter.modules:
            for part in ("lora_A", "lora_B"):
                target = named[f"base_model.model.{module.key}.{part}.default.weight"]
                target.copy_(getattr(module, part))
    for name, parameter in named.items():
        parameter.requires_grad_("lora_B" in name)
    reference.train()
    hooked = GradSampleModule(reference, loss_reduction="sum", strict=False)
    longest = max(LENGTHS)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        mask[row, : len(sample.input_ids)] = 1
    logits = hooked(input_ids=ids, attention_mask=mask, use_cache=False).logits
    losses = [
        cross_entropy(
            logits[row, sample.answer_start - 1 : len(sample.input_ids) - 1],
            ids[row, sample.answer_start : len(sample.input_ids)],
        )
        for row, sample in enumerate(samples)
    ]
    torch.stack(losses).sum().backward()
    rows = unit_rows(session, samples)
    for module in adapter.modules:
        key = module.key + ".lora_B"
        oracle = named[f"base_model.model.{module.key}.lora_B.default.weight"].grad_sample
        for row in range(len(samples)):
            ours = rows[row, adapter.slices[key]].view(adapter.shapes[key])
            assert relative(ours, oracle[row]) < 5e-6


def changes_with_neighbours(session: Session, samples: list[Encoded], rows_of: Callable) -> float:
    whole = rows_of(session, samples)
    worst = 0.0
    for index in range(len(samples)):
        for neighbours in ([], samples[:index], samples[index + 1 :][::-1]):
            alone = rows_of(session, [*neighbours, samples[index]])[-1]
            worst = max(worst, relative(alone, whole[index]))
    return worst


def test_a_unit_does_not_depend_on_its_neighbours(open_tiny, samples_of) -> None:
    session, samples = open_tiny(), samples_of(LENGTHS[:4], UNITS[:4])
    assert changes_with_neighbours(session, samples, unit_rows) < 1e-6
    assert changes_with_neighbours(session, samples, batch_mean_rows) > 0.01


def private(samples: list[Encoded], plan, micro_batch: int = 4) -> PrivateGradient:
    return PrivateGradient(samples, plan, NoiseSource(), seed=0, micro_batch=micro_batch)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 6, 100])
def test_patients_are_clipped_once_however_micro_batches_cut_them(
    open_tiny, samples_of, make_plan, micro_batch
) -> None:
    session, samples = open_tiny(), samples_of(LENGTHS, UNITS)
    patients = [
        torch.stack([plain_gradient(session, samples[i]) for i in p]).mean(0) for p in PATIENTS
    ]
    clip_norm = float(patients[1].norm())  # some above, some below
    source = private(samples, make_plan(clip_norm=clip_norm), micro_batch)
    assert source.units.members == PATIENTS
    ours = source.clipped_sum(session, PATIENTS)
    expected = sum(g * min(1.0, clip_norm / float(g.norm())) for g in patients)
    assert relative(ours, expected) < 2e-6
    # the mutants: admissions clipped one by one; a patient clipped in each micro-batch anew
    every = [plain_gradient(session, sample) for sample in samples]
    each = sum(g * min(1.0, clip_norm / float(g.norm())) / 2 for g in every)
    assert relative(each, expected) > 0.01


def test_removing_a_patient_moves_the_sum_by_no_more_than_the_clip_norm(
    open_tiny, samples_of, make_plan
) -> None:
    session, samples = open_tiny(), samples_of(LENGTHS, UNITS)
    for clip_norm in (1e-3, 1.0, 1e3):
        source = private(samples, make_plan(clip_norm=clip_norm))
        whole = source.clipped_sum(session, PATIENTS)
        for gone in range(3):
            rest = [p for place, p in enumerate(PATIENTS) if place != gone]
            moved = (whole - source.clipped_sum(session, rest)).norm()
            assert float(moved) <= clip_norm * (1 + 1e-5)


def test_an_empty_draw_makes_one_noised_step(open_tiny, samples_of, make_plan) -> None:
    plan = make_plan(sampling_rate=1e-12)
    for samples in (samples_of(LENGTHS, UNITS), []):
        session = open_tiny()
        before = session.adapter.flat.clone()
        state = TrainState()
        metrics = train(
            session,
            samples,
            TrainConfig(learning_rate=1.0),
            state,
            steps=1,
            schedule_steps=1,
            stream="hospital-1",
            source=private(samples, plan),
        )
        moved = (session.adapter.flat - before) / plan.noise_std
        assert (state.step, metrics.loss, metrics.tokens) == (1, None, 0)
        # noise, and nothing but noise: 768 values, within 5.9 and 6 standard deviations
        assert 0.85 < float(moved.std()) < 1.15
        assert abs(float(moved.mean())) < 6 / moved.numel() ** 0.5


def test_a_step_tells_no_loss_norm_or_count(open_tiny, samples_of, make_plan) -> None:
    samples, reports = samples_of(LENGTHS, UNITS), []
    train(
        open_tiny(),
        samples,
        TrainConfig(),
        TrainState(),
        steps=2,
        schedule_steps=2,
        stream="hospital-1",
        on_step=reports.append,
        source=private(samples, make_plan(sampling_rate=1.0)),
    )
    assert [(r.loss, r.gradient_norm, r.tokens) for r in reports] == [(None, None, 0)] * 2


def test_every_released_value_lies_on_the_grid(open_tiny, samples_of, make_plan) -> None:
    session, samples = open_tiny(), samples_of(LENGTHS, UNITS)
    source = private(samples, make_plan(sampling_rate=1.0))
    source(session, 0)
    step = source.mechanism_for(session).grid.step
    released = session.adapter.flat_grad.double() / step
    assert torch.equal(released, released.round())
    assert len(released.unique()) > 0.99 * len(released)
    # the mutant: floating-point normals of the same width
    normal = torch.randn(len(released)).mul_(source.plan.noise_std).double() / step
    assert not torch.equal(normal, normal.round())


def public_constants(open_tiny, samples: list[Encoded], plan, config: TrainConfig) -> list[object]:
    source = private(samples, plan)
    rates: list[object] = []
    train(
        open_tiny(),
        samples,
        config,
        TrainState(),
        steps=3,
        schedule_steps=3,
        stream="h",
        on_step=lambda report: rates.append((report.step, report.learning_rate)),
        source=source,
    )
    mechanism = source.mechanism_for(open_tiny())
    return [source.plan.fingerprint, mechanism.grid, mechanism.residue, *rates]


def test_constants_do_not_depend_on_one_patient(open_tiny, samples_of, make_plan) -> None:
    samples = samples_of(LENGTHS, UNITS)
    config = TrainConfig(schedule="cosine", warmup_steps=1)
    without = [sample for sample in samples if sample.unit != 3]

    def constants(part: list[Encoded], **changes: float) -> list[object]:
        return public_constants(open_tiny, part, make_plan(**changes), config)

    assert constants(samples) == constants(without)
    # the mutant: D from the number of patients
    fitted = [{"expected_batch": len({s.unit for s in part}) * 0.1} for part in (samples, without)]
    assert constants(samples, **fitted[0]) != constants(without, **fitted[1])


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ["fa-lora", "lora"])
def test_privacy_costs_no_more_than_half_a_percent_of_flops(
    open_tiny, samples_of, make_plan, mode
) -> None:
    session, samples = open_tiny(mode), samples_of([64] * 4, range(4))
    config = TrainConfig(batch_size=4)
    plain = flops(lambda: BatchGradient(samples, config, "h")(session, 0))
    source = private(samples, make_plan())
    ours = flops(lambda: source.clipped_sum(session, [(index,) for index in range(4)]))
    assert plain > 1e8
    assert ours / plain <= 1.005

    def ghost() -> None:  # the mutant: norms first, then a second, weighted backward pass
        unit_rows(session, samples)
        BatchGradient(samples, config, "h")(session, 0)

    assert flops(ghost) / plain > 1.3


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes of tensor storages alive that operations have made."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_memory_model_is_within_a_tenth(open_tiny, samples_of, make_plan) -> None:
    session, samples = open_tiny(rank=64), samples_of([6] * 12, range(12))
    source = private(samples, make_plan(), micro_batch=12)
    everyone = [(index,) for index in range(12)]
    parameters = session.adapter.trainable_parameters
    with PeakMemory() as one:  # the same pass, whose gradients are added into one row
        row_1P = torch.zeros(1, parameters)
        add_unit_gradients(session, pack(samples), [0] * 12, row_1P, apart=True)
        del row_1P
    with PeakMemory() as ours:
        source.clipped_sum(session, everyone)
    model = private_bytes(12, parameters)
    assert ours.peak - one.peak + 4 * parameters == pytest.approx(model, rel=0.1)
    assert private_bytes(1, parameters) < 0.5 * model


class Silent(NoiseSource):
    """A secret source whose Gaussian noise is zero."""

    def gaussian(self, count: int, std: float) -> Any:
        return np.zeros(count, dtype=np.int64)


class FittedDivisor(PrivateGradient):
    """The mutant: the sum is divided by the expected number of units that are really there."""

    def __call__(self, session: Session, step: int) -> StepLoss:
        sum_P = self.clipped_sum(session, self.units.draw(self.plan, self.noise))
        fitted = self.plan.expected_batch / (len(self.units) * self.plan.sampling_rate)
        session.adapter.flat_grad.copy_(self.mechanism_for(session).release(sum_P * fitted))
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)


def divides_by_d(kind: type[PrivateGradient], session: Session, samples, plan) -> bool:
    """Whether what is released without noise is the clipped sum over D, for two data sizes."""
    for part in (samples, [sample for sample in samples if sample.unit != 3]):
        source = kind(part, plan, Silent(), seed=0, micro_batch=4)
        source(session, 0)
        released = session.adapter.flat_grad.clone()
        expected = source.clipped_sum(session, source.units.members) / plan.expected_batch
        assert float(expected.norm()) > 0.01
        step = source.mechanism_for(session).grid.step
        if float((released - expected).abs().max()) > step:
            return False
    return True


@pytest.mark.parametrize("expected_batch", [2.0, 8.0])
def test_the_release_is_divided_by_d_whatever_the_data(
    open_tiny, samples_of, make_plan, expected_batch
) -> None:
    plan = make_plan(sampling_rate=1.0, expected_batch=expected_batch)
    session, samples = open_tiny(), samples_of(LENGTHS, UNITS)
    assert divides_by_d(PrivateGradient, session, samples, plan)
    assert not divides_by_d(FittedDivisor, session, samples, plan)
