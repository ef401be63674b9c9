"""Every segment's gradient from one backward pass, against a loop of single-unit passes."""

from dataclasses import replace

import pytest
import torch
from plain_model import plain_gradient
from privacy_fixtures import random_samples
from torch.profiler import ProfilerActivity, profile

from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.kernels import attention, frozen
from common.model.session import Session, open_session
from common.text.batches import Encoded, pack
from common.training.gradients import add_unit_gradients

LENGTHS = (17, 5, 33, 8)


@pytest.mark.parametrize(
    ("mode", "server_round"), [("fa-lora", 1), ("lora", 1), ("rolora", 1), ("rolora", 2)]
)
def test_equal_to_a_loop_of_single_unit_passes(open_tiny, mode, server_round):
    session = open_tiny(mode)
    session.adapter.start_round(server_round)
    units = random_samples(LENGTHS)
    out_UP = torch.zeros(len(units), session.adapter.trainable_parameters)
    add_unit_gradients(session, pack(units), range(len(units)), out_UP)
    assert session.adapter.flat_grad.abs().max() == 0
    for place, sample in enumerate(units):
        expected = plain_gradient(session, sample)
        relative = (out_UP[place] - expected).norm() / expected.norm()
        assert relative < 1e-6


def test_segments_of_one_patient_add_up_over_micro_batches(open_tiny):
    session = open_tiny()
    units = random_samples(LENGTHS)
    out_UP = torch.zeros(2, session.adapter.trainable_parameters)
    add_unit_gradients(session, pack(units[:3]), (0, 1, 0), out_UP)
    add_unit_gradients(session, pack(units[3:]), (1,), out_UP)
    for row, members in enumerate(((0, 2), (1, 3))):
        expected = sum(plain_gradient(session, units[member]) for member in members)
        assert (out_UP[row] - expected).norm() / expected.norm() < 1e-6


def test_a_units_gradient_does_not_depend_on_its_neighbours(open_tiny):
    session = open_tiny()
    units = random_samples(LENGTHS)
    alone = torch.zeros(1, session.adapter.trainable_parameters)
    add_unit_gradients(session, pack(units[2:3]), (0,), alone)
    packed = torch.zeros(4, session.adapter.trainable_parameters)
    add_unit_gradients(session, pack(units), range(4), packed)
    assert (packed[2] - alone[0]).norm() / alone[0].norm() < 1e-6


def test_shapes_that_do_not_fit_are_refused(open_tiny):
    session = open_tiny()
    batch = pack(random_samples(LENGTHS))
    with pytest.raises(ValueError, match="one row per segment"):
        add_unit_gradients(session, batch, (0,), torch.zeros(4, session.adapter.flat.numel()))
    with pytest.raises(ValueError, match="fp32"):
        add_unit_gradients(session, batch, range(4), torch.zeros(4, 7))


@pytest.mark.parametrize("weights", ["bf16", "fp8", "nf4"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_segment_kept_apart_has_the_bits_that_it_has_alone(
    monkeypatch, dtype, kernel, weights
) -> None:
    """Oracle: a pass of its own; where products share rows, tests below and on a GPU tell."""
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(frozen, "fp8_obstacle", lambda device, dtype: "")
    session = open_session(
        resolve_backbone("tiny"),
        AdapterSpec(targets=("q_proj", "v_proj", "o_proj", "down_proj")),
        device="cpu",
        dtype=dtype,
        attention=kernel,
        weights=weights,
        recompute="mlp",
    )
    session.adapter.flat.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(7))
    units = [sample(length, unit) for unit, length in enumerate((90, 31, 7, 64))]
    units[1] = replace(units[1], set_at=20, set_tokens=(11, 12, 13))

    def gradients(group: list[Encoded]) -> torch.Tensor:
        out_UP = torch.zeros(len(group), session.adapter.flat.numel())
        add_unit_gradients(session, pack(group), range(len(group)), out_UP, apart=True)
        return out_UP

    for shortened in (False, True):
        monkeypatch.setattr(Session, "shortens", shortened)
        for row_P, unit in zip(gradients(units), units, strict=True):
            assert float(row_P.norm()) > 0
            assert torch.equal(row_P, gradients([unit])[0])


# On rows of several segments: they move or count values, or round once, so that nothing else in the
# call can change what a row becomes. The sum is the total loss, the index_add_ its report.
MOVES = """
    to lift_fresh detach_ bincount min max reshape view embedding index_select select as_strided
    slice unsqueeze view_as new_empty chunk split narrow split_with_sizes index empty_like zero_
    new_zeros _index_put_impl_ select_backward copy_ squeeze
"""
ROUND_ONCE = "add add_ mul sum index_add_"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "gate_proj", "down_proj")])
def test_whatever_rounds_twice_in_a_pass_kept_apart_is_by_segment(
    monkeypatch, targets, dtype
) -> None:
    """Oracle: torch's own record of the shapes of every operator, over the whole pass."""
    session = open_session(
        resolve_backbone("tiny"), AdapterSpec(targets=targets), device="cpu", dtype=dtype
    )
    units = [sample(12, 0), sample(21, 1)]
    out_UP = torch.zeros(2, session.adapter.flat.numel())
    honest, attended = attention._KERNEL_FUNCTIONS["sdpa"], []

    def attend(q_THE, k_TGE, v_TGE, scaling, packing):
        attended.append((len(q_THE), packing.bounds))
        return honest(q_THE, k_TGE, v_TGE, scaling, packing)

    monkeypatch.setitem(attention._KERNEL_FUNCTIONS, session.attention.value, attend)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        add_unit_gradients(session, pack(units), range(2), out_UP, apart=True)
    names = ("aten::mm", "aten::addmm", "aten::addmm_")
    shapes = [size for one in seen.events() if one.name in names for size in one.input_shapes]
    assert [12, 64] in shapes
    assert [21, 64] in shapes
    # The loss, too: 6 and 11 tokens with a label.
    assert [6, 64] in shapes
    assert [11, 64] in shapes
    together = {
        one.name.removeprefix("aten::")
        for one in seen.events()
        if one.name.startswith("aten::")
        and any(33 in size or 17 in size for size in one.input_shapes)
    }
    assert together <= {*MOVES.split(), *ROUND_ONCE.split()}
    assert set(attended) == {(12, (0, 12)), (21, (0, 21))}


def sample(length: int, unit: int) -> Encoded:
    ids = torch.randint(5, 900, (length,), generator=torch.Generator().manual_seed(unit)).tolist()
    return Encoded(input_ids=tuple(ids), answer_start=max(1, length // 2), unit=unit)
