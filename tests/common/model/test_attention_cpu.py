"""Packed attention on the CPU against the formula in fp64, segment by segment."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from common.model.kernels import attention
from common.model.kernels.attention_cpu import packed_attention, token_attention


def exact(q, k, v, scaling, bounds):
    """Softmax attention written out, in fp64."""
    shared = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
    parts = []
    for start, stop in itertools.pairwise(bounds):
        part_q, part_k, part_v = (t[start:stop].transpose(0, 1) for t in (q, k, v))
        scores = part_q @ part_k.transpose(1, 2) * scaling
        future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        parts.append((weights @ part_v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("dtype", "amx"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize(
    ("heads", "groups", "width", "bounds", "sharpness"),
    [
        (9, 3, 64, (0, 300, 301, 420), 1.0),
        (4, 4, 16, (0, 37), 1.0),
        (8, 2, 128, (0, 128, 384), 1.0),
        (6, 1, 32, (0, 129, 130, 259), 6.0),
        (4, 2, 128, (0, 200), 10.0),
    ],
)
def test_outputs_and_gradients(dtype, amx, heads, groups, width, bounds, sharpness, monkeypatch):
    """With AMX the forward is torch's; that of bf16 elsewhere, and the backward, are ours."""
    monkeypatch.setattr("common.model.kernels.attention_cpu._multiplies_bf16", lambda: not amx)
    generator = torch.Generator().manual_seed(0)

    def draw(count, factor=1.0):
        values = torch.randn(bounds[-1], count, width, generator=generator) * factor
        return values.to(dtype).requires_grad_()

    q, k, v = draw(heads, sharpness), draw(groups), draw(groups)
    d_out = draw(heads).detach()
    scaling = width**-0.5
    out = packed_attention(q, k, v, scaling, bounds)
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = exact(*wide, scaling, bounds)
    expected_gradients = torch.autograd.grad(expected, wide, d_out.double())
    # bf16 has 8 significant bits: 2^-8 = 0.4% per rounding, a handful of them in a row.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < tolerance
    if dtype == torch.bfloat16:
        assert (out.double() - expected).norm() / expected.norm() < 4e-3


def test_a_score_is_rounded_where_it_is_small(monkeypatch):
    """Scores of a row near 100, the largest wins by 1: bf16 would round them to halves."""
    monkeypatch.setattr("common.model.kernels.attention_cpu._multiplies_bf16", lambda: True)
    q, k, v = (torch.zeros(2, 1, 4, dtype=torch.bfloat16) for _ in range(3))
    q[1, 0, :2] = torch.tensor([10.0, 1.0])
    k[:, 0, 0] = 10.0
    k[0, 0, 1], v[0, 0, 0] = 0.25, 1.0
    out = packed_attention(q, k, v, 1.0, (0, 2))
    assert out[1, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-0.25)), abs=2e-3)


def test_scores_that_bf16_rounds_by_hundreds_have_finite_outputs_and_gradients(monkeypatch):
    monkeypatch.setattr("common.model.kernels.attention_cpu._multiplies_bf16", lambda: True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, 2, 32, generator=generator).bfloat16() for _ in range(3))
    inputs = [t.requires_grad_() for t in (q * 3e4, k, v)]
    out = packed_attention(*inputs, 32**-0.5, (0, 200))
    gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert all(torch.isfinite(one).all() for one in (out, *gradients))
    expected = exact(*(t.detach().double() for t in inputs), 32**-0.5, (0, 200))
    assert (out.double() - expected).norm() / expected.norm() < 4e-3


def test_no_gradient_crosses_segments_in_bf16():
    q, k, v = (torch.randn(300, 2, 32).bfloat16().requires_grad_() for _ in range(3))
    out = packed_attention(q, k, v, 0.2, (0, 140, 160, 300))
    gradients = torch.autograd.grad(out[140:160].float().sum(), (q, k, v))
    for gradient in gradients:
        assert gradient[:140].abs().max() == 0
        assert gradient[160:].abs().max() == 0
        assert torch.isfinite(gradient).all()
    assert gradients[2][140:160].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_one_token_of_each_sequence_attends_to_its_cache(dtype, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (torch.randn(3, *size, generator=generator) * 2).to(dtype)
        for size in ((6, 1, 32), (2, 40, 32), (2, 40, 32))
    )
    lengths = torch.tensor([40, 7, 1]) if masked else torch.tensor([40, 40, 40])
    has_B11L = torch.arange(40) < lengths[:, None, None, None]
    out = token_attention(q, k, v, 0.2, has_B11L if masked else None)
    for row, length in enumerate(lengths.tolist()):
        part = (t[row, :, :length].double() for t in (k, v))
        k_part, v_part = (t.repeat_interleave(3, 0) for t in part)
        weights = (q[row].double() @ k_part.transpose(1, 2) * 0.2).softmax(-1)
        expected = (weights @ v_part).transpose(0, 1)
        tolerance = 1e-6 if dtype == torch.float32 else 5e-3
        assert (out[row].double() - expected).norm() / expected.norm() < tolerance


def test_a_cache_is_attended_to_alike_with_amx_and_without(monkeypatch):
    attend = transformers.AttentionInterface()[attention.register()]
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False)
    q, k, v = (torch.randn(2, heads, n, 32).bfloat16() for heads, n in ((6, 1), (2, 9), (2, 9)))
    has_B11L = torch.arange(9) < torch.tensor([9, 4])[:, None, None, None]
    called, outputs = [], []
    ours = attention.token_attention
    monkeypatch.setattr(attention, "token_attention", lambda *a: called.append(amx) or ours(*a))
    for amx in (False, True):
        monkeypatch.setattr(
            "common.model.kernels.attention_cpu._multiplies_bf16", lambda amx=amx: not amx
        )
        outputs.append(attend(module, q, k, v, has_B11L, scaling=0.2)[0])
    assert called == [False]
    assert outputs[0].shape == outputs[1].shape == (2, 1, 6, 32)
    torch.testing.assert_close(*outputs, rtol=0, atol=0.02)
