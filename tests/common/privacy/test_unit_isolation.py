"""A unit's gradient is a function of that unit alone, in every arithmetic."""

import pytest
import torch

from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.kernels import elementwise, frozen
from common.model.session import Session, open_session
from common.privacy.mechanism import gradients
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.text.batches import Encoded
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


PATHS = [
    {"kernels": "compiled"},
    {"kernels": "triton"},
    {"weights": "fp8"},
    {"weights": "fp8", "kernels": "triton"},
]
"""What runs on a GPU only, or when asked for; each by other means here."""


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_units_do_not_touch_each_other_on_any_path(
    open_tiny, samples_of, make_plan, monkeypatch, path
) -> None:
    if path.get("kernels") == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(elementwise, "_obstacle", lambda candidate, device: "")
    monkeypatch.setattr(frozen, "fp8_obstacle", lambda device, dtype: "")
    monkeypatch.setattr(Session, "shortens", True)
    session = open_tiny(dtype="fp32", **path)
    noise = torch.randn(session.adapter.flat.shape, generator=torch.Generator().manual_seed(7))
    session.adapter.flat.add_(noise, alpha=0.02)
    samples, plan = samples_of([6, 4, 7], range(3)), make_plan(clip_norm=0.1)
    assert excess_without_the_first(session, samples, plan) < 1e-5
