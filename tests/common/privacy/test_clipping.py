"""Clipping (specification test 3)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.privacy.mechanism.clipping import clipped_sum

C = 0.7
Clip = Callable[[Tensor, float], Tensor]
HOSTILE = [0.0, 1.0, -3.5, 1e-30, -1e-42, 1e30, -3e38, 2e19, float("inf"), float("nan")]


def bounded(clip: Clip, rows: Tensor) -> bool:
    """Whether each row alone, and each row's removal from all, stays within C (fp64 oracle)."""
    whole = clip(rows, C).double()
    for index in range(len(rows)):
        alone = clip(rows[index : index + 1], C).double()
        without = clip(torch.cat([rows[:index], rows[index + 1 :]]), C).double()
        if not bool(torch.isfinite(alone).all()) or float(alone.norm()) > C * (1 + 1e-6):
            return False
        if not float((whole - without).norm()) <= C * (1 + 1e-6):
            return False
    return True


def no_clip(rows: Tensor, clip_norm: float) -> Tensor:
    return rows.sum(0)


def clip_each_coordinate(rows: Tensor, clip_norm: float) -> Tensor:
    return rows.nan_to_num(0.0).clamp(-clip_norm, clip_norm).sum(0)


def clip_without_zeroing(rows: Tensor, clip_norm: float) -> Tensor:
    return (clip_norm / rows.norm(dim=1)).clamp(max=1.0) @ rows


def clip_the_batch(rows: Tensor, clip_norm: float) -> Tensor:
    mean = rows.nan_to_num(0.0, 0.0, 0.0).sum(0)
    return mean * min(1.0, len(rows) * clip_norm / max(float(mean.norm()), 1e-30))


def rows_of(seed: int, units: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 2, units)[:, None]
    return torch.randn(units, width, generator=generator) * scale


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(HOSTILE), min_size=3, max_size=3), min_size=1, max_size=6))
def test_no_hostile_unit_exceeds_the_clip_norm(rows: list[list[float]]) -> None:
    assert bounded(clipped_sum, torch.tensor(rows))


def one_long_sum(rows: Tensor, clip_norm: float) -> Tensor:
    """The mutant that torch's own norm makes: 1e-6 off and worse at a large width."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    return (clip_norm / norms).clamp(max=1.0) @ rows


@pytest.mark.parametrize("width", [1, 17, 4096, 184_320, 1_310_720])
def test_bound_holds_at_every_width(width: int) -> None:
    equal = torch.logspace(-3, 2, 3)[:, None].expand(3, width).contiguous()
    for rows in (rows_of(width, 3, width), equal):
        assert bounded(clipped_sum, rows)


def test_the_bound_rejects_a_norm_by_one_long_fp32_sum() -> None:
    assert not bounded(one_long_sum, rows_of(0, 3, 1_310_720))


@pytest.mark.parametrize(
    "mutant", [no_clip, clip_each_coordinate, clip_without_zeroing, clip_the_batch]
)
def test_the_bound_rejects_broken_clipping(mutant: Clip) -> None:
    hostile = torch.tensor([[1.0, -3.5, 1e30], [0.5, 0.5, 0.5], [float("inf"), 0.0, 1.0]])
    assert not (bounded(mutant, rows_of(0, 6, 100)) and bounded(mutant, hostile))


def test_values_equal_a_loop_in_double_precision() -> None:
    rows = rows_of(3, 9, 501)
    expected = np.zeros(501)
    for row in rows.double().numpy():
        expected += row * min(1.0, C / np.sqrt(np.sum(row**2)))
    np.testing.assert_allclose(clipped_sum(rows, C).numpy(), expected, atol=2e-6)


def test_a_unit_within_the_norm_is_untouched() -> None:
    rows = torch.tensor([[0.3, 0.4, 0.0]])
    assert torch.equal(clipped_sum(rows, C), rows[0].double())
    assert torch.equal(clipped_sum(torch.empty(0, 3), C), torch.zeros(3, dtype=torch.float64))


def test_one_of_thousands_moves_the_sum_by_what_it_adds_alone() -> None:
    """All of one direction: the fp32 sum moves by more than the noise allows for (2**-10)."""
    rows = torch.ones(1, 1000).repeat(4096, 1)

    def moved(clip: Clip) -> float:
        return float((clip(rows, 1.0).double() - clip(rows[1:], 1.0).double()).norm())

    assert abs(moved(clipped_sum) - 1) <= 1e-6
    assert moved(clip_without_zeroing) > 1 + 2**-12  # whose sum is one product in fp32
    some = rows_of(5, 40, 321)
    parts = sum(clipped_sum(row[None], C) for row in some)
    torch.testing.assert_close(clipped_sum(some, C), parts, rtol=0, atol=1e-13)


def test_half_precision_gradients_are_clipped_in_fp32() -> None:
    rows = rows_of(4, 4, 64).bfloat16()
    assert torch.equal(clipped_sum(rows, C), clipped_sum(rows.float(), C))
    assert bounded(clipped_sum, rows)
