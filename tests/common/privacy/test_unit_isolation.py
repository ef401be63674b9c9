"""A unit's gradient is a function of that unit alone, in every arithmetic."""

import pytest
import torch

from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import Session, open_session
from common.privacy.mechanism import gradients
from common.privacy.mechanism.clipping import clipped_sum
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.text.batches import Encoded, pack
from common.training.gradients import add_unit_gradients


def private(samples: list[Encoded], plan) -> PrivateGradient:
    return PrivateGradient(samples, plan, NoiseSource(), seed=0, micro_batch=4)


def excess_without_the_first(session: Session, samples: list[Encoded], plan) -> float:
    """How far the clipped sum moves beyond the leaving unit's own part, in clip norms."""
    source, everyone = private(samples, plan), [(place,) for place in range(len(samples))]
    whole, rest = (source.clipped_sum(session, units) for units in (everyone, everyone[1:]))
    own = source.clipped_sum(session, everyone[:1])
    return float((whole - rest - own).norm()) / plan.clip_norm


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_units_do_not_touch_each_other_on_a_real_backbone(
    dtype, samples_of, make_plan, monkeypatch
) -> None:
    session = open_session(
        resolve_backbone("embedded"), AdapterSpec(), device="cpu", dtype=dtype, threads=1
    )
    noise = torch.randn(session.adapter.flat.shape, generator=torch.Generator().manual_seed(7))
    session.adapter.flat.add_(noise, alpha=0.02)
    samples, plan = samples_of([90, 31, 120, 64, 77, 45], range(6)), make_plan(clip_norm=0.1)
    assert excess_without_the_first(session, samples, plan) < 1e-5
    if dtype == "bf16" and torch.cpu._is_amx_tile_supported():
        # the mutant: units share passes whatever the arithmetic
        shared = gradients._micro_batches
        monkeypatch.setattr(
            gradients, "_micro_batches", lambda drawn, size, alone: shared(drawn, size, alone=False)
        )
        assert excess_without_the_first(session, samples, plan) > 1e-3


@pytest.mark.parametrize(("dtype", "passes"), [("fp32", [4, 2]), ("bf16", [1, 2, 2, 1])])
def test_units_share_passes_in_fp32_only(
    open_tiny, samples_of, make_plan, monkeypatch, dtype, passes
) -> None:
    seen = []

    def spied(session, batch, rows, out_UP):
        seen.append(batch.segments)
        return add_unit_gradients(session, batch, rows, out_UP)

    monkeypatch.setattr(gradients, "add_unit_gradients", spied)
    source = private(samples_of([8] * 6, [0, 1, 1, 2, 2, 3]), make_plan())
    source.clipped_sum(open_tiny(dtype=dtype), [(0,), (1, 2), (3, 4), (5,)])
    assert seen == passes


class AdmissionsAdded(PrivateGradient):
    """The mutant: the sum of a patient's admissions in place of their mean."""

    def clipped_sum(self, session, drawn):
        rows_UP = torch.zeros(len(drawn), session.adapter.trainable_parameters)
        for row_P, members in zip(rows_UP, drawn, strict=True):
            samples = [self.dataset[index] for index in members]
            add_unit_gradients(session, pack(samples), [0] * len(samples), row_P[None])
        return clipped_sum(rows_UP, self.plan.clip_norm)


@pytest.mark.parametrize("clip_norm", [1e3, 0.1])
def test_a_patient_who_came_three_times_weighs_what_one_visit_weighs(
    open_tiny, samples_of, make_plan, clip_norm
) -> None:
    """Oracle: the mean of equal admissions is each of them, however often a patient came."""
    session, plan = open_tiny(), make_plan(clip_norm=clip_norm)
    (record,) = samples_of([12], [1])
    often, once = [record] * 3, [record]

    def contribution(kind: type[PrivateGradient], samples: list[Encoded]) -> torch.Tensor:
        source = kind(samples, plan, NoiseSource(), seed=0, micro_batch=2)
        return source.clipped_sum(session, source.units.members)

    single = contribution(PrivateGradient, once)
    assert float((contribution(PrivateGradient, often) - single).norm()) < 1e-5 * single.norm()
    added = contribution(AdmissionsAdded, often)
    if clip_norm > 1:  # where the clip is idle nothing but the mean keeps it at one visit's weight
        assert float((added - 3 * single).norm()) < 1e-5 * single.norm()
