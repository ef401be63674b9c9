"""Each kind of elementwise kernels against plain torch in float64, forward and backward."""

import pytest
import torch
from torch.nn import functional

from common.errors import UserError
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.kernels import choice
from common.model.kernels.choice import choose_kernels, kernels_named
from common.model.session import open_session
from common.text.batches import Encoded
from common.training.gradients import BatchGradient
from common.training.loop import TrainConfig

TOKENS, HIDDEN, MLP, HEADS, GROUPS, WIDTH, VOCABULARY = 37, 96, 160, 6, 2, 16, 517
CPU = torch.device("cpu")


COMPILED = pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.process])


@pytest.fixture(params=["torch", COMPILED, "triton"])
def found(request):
    """One candidate; Triton's interpreter runs its kernels here (see ``tests/conftest.py``)."""
    return kernels_named(needed(request.param))


def needed(name: str) -> str:
    """Skip where Triton, or what compiles for a CPU, is not installed."""
    if name == "triton":
        pytest.importorskip("triton")
    elif reason := choice.obstacle(name, CPU):
        pytest.skip(reason)
    return name


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found.double() - expected).norm() / expected.norm()) < 3e-7


def test_rms_norm(found):
    x, weight = drawn(TOKENS, HIDDEN), drawn(HIDDEN, seed=1)
    d_out, d_beside = drawn(TOKENS, HIDDEN, seed=2), drawn(TOKENS, HIDDEN, seed=3)
    wide = x.double().requires_grad_()
    expected = functional.rms_norm(wide, (HIDDEN,), weight.double(), 1e-5)
    (d_x,) = torch.autograd.grad(expected, wide, d_out.double())
    out, total, rstd = found.norm(x, None, weight, 1e-5)
    assert total is x
    close(out, expected.detach())
    close(found.norm_backward(d_out, d_beside, x, rstd, weight), d_x + d_beside.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_of_a_sum_is_that_of_the_rounded_sum(found, dtype, request):
    """Oracle: torch's sum, to the bit, and the norm of it; what was added is left as it was."""
    if dtype == torch.bfloat16 and "torch" not in request.node.name:
        pytest.skip("Triton's interpreter cuts where a GPU rounds; compiled norms do not round")
    x, beside = drawn(TOKENS, HIDDEN).to(dtype), drawn(TOKENS, HIDDEN, seed=4).to(dtype)
    weight, given = drawn(HIDDEN, seed=1).to(dtype), (x.clone(), beside.clone())
    out, total, rstd = found.norm(x, beside, weight, 1e-5)
    assert torch.equal(total, x + beside)
    plain, _, plain_rstd = found.norm(total, None, weight, 1e-5)
    assert torch.equal(out, plain)
    assert torch.equal(rstd, plain_rstd)
    assert torch.equal(x, given[0])
    assert torch.equal(beside, given[1])


def test_swiglu(found):
    gate, up, d_out = (drawn(TOKENS, MLP, seed=seed) for seed in range(3))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    expected = functional.silu(wide[0]) * wide[1]
    grads = torch.autograd.grad(expected, wide, d_out.double())
    close(found.swiglu(gate, up), expected.detach())
    for ours, theirs in zip(found.swiglu_backward(d_out, gate, up), grads, strict=True):
        close(ours, theirs)


def test_rotation_and_its_transpose(found):
    q, k = drawn(TOKENS, HEADS, WIDTH), drawn(TOKENS, GROUPS, WIDTH, seed=1)
    angles = torch.rand(TOKENS, WIDTH // 2, generator=torch.Generator().manual_seed(2)) * 6
    angles = torch.cat([angles, angles], 1)
    cos, sin = angles.cos(), angles.sin()
    outputs = found.rotate(q, k, cos, sin, False)
    assert [out.shape for out in outputs] == [q.shape, k.shape]
    for x, out in zip((q, k), outputs, strict=True):
        first, second = x.double().chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        close(out, x.double() * cos.double()[:, None] + turned * sin.double()[:, None])
    for x, back in zip((q, k), found.rotate(*outputs, cos, sin, True), strict=True):
        close(back, x.double())


@pytest.mark.parametrize("weighted", [True, False])
def test_losses_and_their_gradient(found, weighted):
    logits = 4 * drawn(TOKENS, VOCABULARY)
    labels = torch.randint(0, VOCABULARY, (TOKENS, 1), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(TOKENS, 1, generator=torch.Generator().manual_seed(2))
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, labels[:, 0], reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights[:, 0].double()).sum(), wide)
    given = logits.clone()
    close(found.losses(given, labels, weights if weighted else None), expected.detach())
    if weighted:
        close(given, gradient)
    else:
        assert torch.equal(given, logits)


def test_quantised_rows(found, request):
    x, factors = drawn(TOKENS, HIDDEN), drawn(HIDDEN, seed=1).abs() + 0.5
    x[3] = 0
    values, scales = found.quantise(x, factors)
    exact = (x * factors).double()
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(values[3].float(), torch.zeros(HIDDEN))
    close(scales[:3], exact[:3].abs().amax(1, keepdim=True) / 448)
    apart = (values.double() * scales.double() - exact).abs()
    # e4m3 has three bits behind the point: half a step is a sixteenth at most, and 2**-10 near
    # zero. Triton's interpreter cuts where a GPU rounds, knows no numbers below 2**-6, and loses
    # the carry of a few.
    interpreted = "triton" in request.node.name
    steps, smallest, most = (2, 2**-6, 0.95) if interpreted else (1, 2**-10, 1.0)
    near = apart <= (steps * exact.abs() / 16 + scales * smallest) * 1.0001
    assert float(near.double().mean()) >= most


def test_bytes_are_transposed(found):
    values = torch.arange(70 * 130).remainder(251).to(torch.uint8).view(70, 130)
    turned = found.transpose(values.view(torch.float8_e4m3fn))
    assert torch.equal(turned.view(torch.uint8), values.T)


@pytest.mark.parametrize("name", ["triton", COMPILED])
def test_the_gradient_of_b_is_that_of_plain_torch(monkeypatch, name):
    needed(name)
    monkeypatch.setattr(choice, "obstacle", lambda *_: "")
    data = [
        Encoded(input_ids=tuple(range(5, 5 + size)), answer_start=size // 2, unit=0)
        for size in (24, 9, 13)
    ]
    gradients = []
    for kind in ("torch", name):
        session = open_session(
            resolve_backbone("tiny"), AdapterSpec(), device="cpu", dtype="fp32", kernels=kind
        )
        session.adapter.flat.copy_(0.1 * drawn(session.adapter.flat.numel()))
        BatchGradient(data, TrainConfig(batch_size=3), "x")(session, 0)
        gradients.append(session.adapter.flat_grad.clone())
    assert session.kernels.value == name
    expected, ours = gradients
    assert float((ours - expected).norm() / expected.norm()) < 5e-6


def test_the_choice_says_why():
    assert choose_kernels("auto", CPU).value == "torch"
    assert "at once" in choose_kernels("auto", CPU).reason
    assert choose_kernels("torch", CPU).reason == "asked for"
    with pytest.raises(UserError, match=r"model.kernels=triton cannot run here.*CUDA"):
        choose_kernels("triton", CPU)
    with pytest.raises(UserError, match="model.kernels='fast'"):
        choose_kernels("fast", CPU)


@pytest.mark.process
def test_what_compiles_is_tried(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"compiled cannot run here: no C\+\+ compiler \(no-such"):
        choose_kernels("compiled", CPU)
    for text, words in (("#!/bin/sh\nexit 1\n", "does not compile"), ("", "does not start")):
        compiler = tmp_path / words.replace(" ", "-")
        compiler.write_text(text)
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        with pytest.raises(UserError, match=f"compiled cannot run here: .*{words}"):
            choose_kernels("compiled", CPU)
    monkeypatch.delenv("CXX")
    needed("compiled")
    monkeypatch.setattr(choice.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match="does not compile Python's headers"):
        choose_kernels("compiled", CPU)
    with pytest.raises(UserError, match="compiled cannot run here: compiled for a CPU"):
        choose_kernels("compiled", torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.process
def test_compiled_work_in_bf16_is_rounded_once():
    """Oracle: the same in float64, from the same rounded inputs; half a step is 2**-9."""
    found = kernels_named(needed("compiled"))
    x, beside, d_out, d_beside = (drawn(TOKENS, HIDDEN, seed=seed).bfloat16() for seed in range(4))
    weight = drawn(HIDDEN, seed=4).bfloat16()
    out, total, rstd = found.norm(x, beside, weight, 1e-5)
    assert torch.equal(total, x + beside)
    wide = total.double().requires_grad_()
    expected = functional.rms_norm(wide, (HIDDEN,), weight.double(), 1e-5)
    (d_x,) = torch.autograd.grad(expected, wide, d_out.double())
    near(out, expected.detach())
    near(found.norm_backward(d_out, d_beside, total, rstd, weight), d_x + d_beside.double())
    gate, up, d_out = (drawn(TOKENS, MLP, seed=seed).bfloat16() for seed in range(3))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    expected = functional.silu(wide[0]) * wide[1]
    near(found.swiglu(gate, up), expected.detach())
    grads = torch.autograd.grad(expected, wide, d_out.double())
    for ours, theirs in zip(found.swiglu_backward(d_out, gate, up), grads, strict=True):
        near(ours, theirs)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert float((found.double() - expected).norm() / expected.norm()) < 4e-3


@pytest.mark.slow
@pytest.mark.process
def test_a_length_or_a_layout_is_not_compiled_by_itself():
    """Packed batches have ever new lengths."""
    found = kernels_named(needed("compiled"))

    def work(tokens: int) -> int:
        even = tokens % 2 == 0
        x = drawn(tokens, 2 * HIDDEN)[:, :HIDDEN] if even else drawn(tokens, HIDDEN)
        weight = drawn(HIDDEN).requires_grad_(even)
        out, total, rstd = found.norm(x, x, weight, 1e-5)
        found.norm_backward(out, x, total, rstd, weight)
        found.norm(out, None, weight, 1e-5)
        found.swiglu_backward(out, x, found.swiglu(x, out))
        q, k = (drawn(heads, tokens, WIDTH).transpose(0, 1) for heads in (HEADS, GROUPS))
        for back in (False, True):
            found.rotate(q, k, drawn(tokens, WIDTH), drawn(tokens, WIDTH, seed=1), back)
        return len(out)

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            work(TOKENS)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (2, 5, 64, 128, 997):
            assert work(tokens) == tokens
