"""Installed FlashAttentions, 2 and 3: packages in their place that attend by a loop."""

import importlib
import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from common.choice import HOPPER, NO_FLASH_ATTN, NO_FLASH_ATTN_3
from common.model.kernels import attention, attention_cuda
from common.model.kernels.attention import Packing, attend
from common.text.batches import Encoded, pack

CPU, BF16 = torch.device("cpu"), torch.bfloat16
MODULES = {"flash-attn-3": "flash_attn_interface", "flash-attn": "flash_attn"}


def sample(length):
    return Encoded(input_ids=tuple(range(3, 3 + length)), answer_start=1, unit=0)


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal
):
    """Both packages' signature, as far as their documentation and ours go; by a naive loop."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(lengths), max(lengths))
    shared = q.shape[1] // k.shape[1]
    rows = []
    for start, stop in itertools.pairwise(cu_seqlens_q.tolist()):
        for row, head in itertools.product(range(start, stop), range(q.shape[1])):
            keys, values = (t[start : row + 1, head // shared].float() for t in (k, v))
            weights = ((keys @ q[row, head].float()) * softmax_scale).softmax(0)
            rows.append(weights @ values)
    return torch.stack(rows).view(q.shape).to(q.dtype)


@pytest.fixture(autouse=True)
def forget():
    """Nothing that was tried here is remembered, before or after."""
    for cached in (attention_cuda._probe, attention._kernel_of_short_segments):
        cached.cache_clear()
    yield
    for cached in (attention_cuda._probe, attention._kernel_of_short_segments):
        cached.cache_clear()


@pytest.fixture
def install(monkeypatch):
    def install(name, call):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.flash_attn_varlen_func = call
        monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.fixture
def card(monkeypatch):
    """Let a CPU pass for a card of some compute capability."""

    def card(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, minor))

    return card


@pytest.mark.parametrize("kernel", MODULES)
@pytest.mark.parametrize("beside", [lambda out: out, lambda out: (out, out[..., 0].T)])
def test_an_installed_flash_attention_is_eager_attention(install, kernel, beside):
    """Releases that return the log-sum-exp beside the output, and those that do not."""
    install(MODULES[kernel], lambda *given, **named: beside(varlen(*given, **named)))
    batch = pack([sample(length) for length in (5, 2, 11)])
    found = {}
    for name in ("eager", kernel):
        generator = torch.Generator().manual_seed(3)
        q, k, v = (
            torch.randn(batch.tokens, heads, 8, generator=generator).requires_grad_()
            for heads in (4, 2, 2)
        )
        out = attend(q, k, v, 0.3, Packing.of(batch, name, CPU))
        upstream = torch.randn(out.shape, generator=generator)
        found[name] = [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]
    for ours, theirs in zip(found[kernel], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


def test_each_is_looked_for_where_it_can_run(install, card):
    newer, older = MODULES.values()
    card(9, 0)
    assert attention_cuda.flash_attn_obstacle(newer, CPU) == NO_FLASH_ATTN_3
    assert attention_cuda.flash_attn_obstacle(older, CPU) == NO_FLASH_ATTN
    install(newer, varlen)
    install(older, varlen)
    for capability, obstacle in (((9, 0), ""), ((8, 9), HOPPER), ((10, 0), HOPPER)):
        card(*capability)
        assert attention_cuda.flash_attn_obstacle(newer, CPU) == obstacle
        assert attention_cuda.flash_attn_obstacle(older, CPU) == ""


@pytest.mark.parametrize("module", MODULES.values())
def test_one_that_does_not_run_is_passed_over_with_the_reason(card, tmp_path, monkeypatch, module):
    """A wheel of another torch; a package of that name which is something else."""
    card(9, 0)
    monkeypatch.syspath_prepend(tmp_path)
    for text, reason in (
        ("raise ImportError('undefined symbol: _ZN3c105')", "undefined symbol"),
        ("", "cannot import name 'flash_attn_varlen_func'"),
        ("def flash_attn_varlen_func(q, *rest, **named):\n    return q", "grad"),
    ):
        (tmp_path / f"{module}.py").write_text(text + "\n", encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        attention_cuda._probe.cache_clear()
        obstacle = attention_cuda.flash_attn_obstacle(module, CPU)
        assert obstacle.startswith("tried, and")
        assert reason in obstacle
    monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.parametrize("here", [["flash-attn-3"], ["flash-attn"], ["torch-flash"], ["sdpa"]])
def test_short_segments_go_from_cudnn_to_the_first_that_runs(monkeypatch, here):
    calls = []
    for name in attention.KERNELS:
        call = lambda *given, name=name: calls.append((name, given[-1].kernel))  # noqa: E731
        monkeypatch.setitem(attention._KERNEL_FUNCTIONS, name, call)
    runs = {*here, "sdpa", "eager"}
    monkeypatch.setattr(attention, "obstacle", lambda kernel, *_: "" if kernel in runs else "no")
    packing = Packing.of(pack([sample(3)]), "cudnn", CPU)
    attention._cudnn(*(torch.zeros(3, 1, 8, dtype=BF16),) * 3, 0.3, packing)
    assert calls == [(here[0], here[0])]
