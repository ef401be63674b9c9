"""On a CUDA device: each kernel against plain torch, and a patient's gradient beside others.

They need torch, transformers, cryptography and pytest alone, and so run on a bare machine:

    PYTHONPATH=.:tests/fixtures python -m pytest --noconftest -p privacy_fixtures \
        tests/common/model/kernels/test_cuda.py tests/common/privacy/test_unit_isolation.py -k cuda
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.backbone.reading import Destination, Reading
from common.model.kernels.attention import KERNELS, Packing, attend, obstacle
from common.model.kernels.choice import kernels_named
from common.model.kernels.frozen import Fp8Weight, choose_weights, fp8_obstacle, quantiser_of
from common.model.kernels.nf4 import Nf4Weight
from common.model.session import DTYPES, Session, open_session
from common.text.batches import Encoded, pack
from common.training.gradients import BatchGradient, add_unit_gradients
from common.training.loop import TrainConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TOKENS, HIDDEN, MLP, HEADS, GROUPS, WIDTH, VOCABULARY = 301, 4096, 1536, 8, 2, 128, 4099
CLOSE = {"fp32": 2e-6, "bf16": 1e-2}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def drawn(device) -> Callable[..., Tensor]:
    def draw(*size: int, seed: int = 0, dtype: str = "fp32") -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(*size, generator=generator, device=device).to(DTYPES[dtype])

    return draw


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_is_plain_torch_in_float64_on_cuda(drawn, dtype) -> None:
    kernels, limit = kernels_named("triton"), CLOSE[dtype]
    x, weight, d_out, d_beside = (
        drawn(TOKENS, HIDDEN, dtype=dtype),
        drawn(HIDDEN, seed=1, dtype=dtype),
        drawn(TOKENS, HIDDEN, seed=2, dtype=dtype),
        drawn(TOKENS, HIDDEN, seed=3, dtype=dtype),
    )
    wide = x.double().requires_grad_()
    expected = functional.rms_norm(wide, (HIDDEN,), weight.double(), 1e-5)
    (d_x,) = torch.autograd.grad(expected, wide, d_out.double())
    out, _, rstd = kernels.norm(x, None, weight, 1e-5)
    assert far(out, expected.detach()) < limit
    apart, whole, _ = kernels.norm(x - d_beside, d_beside, weight, 1e-5)
    assert torch.equal(whole, (x - d_beside) + d_beside)
    assert torch.equal(apart, kernels.norm(whole, None, weight, 1e-5)[0])
    assert far(kernels.norm_backward(d_out, d_beside, x, rstd, weight), d_x + d_beside) < limit
    gate, up, d_out = (drawn(TOKENS, MLP, seed=seed, dtype=dtype) for seed in range(3))
    wides = [t.double().requires_grad_() for t in (gate, up)]
    expected = functional.silu(wides[0]) * wides[1]
    grads = torch.autograd.grad(expected, wides, d_out.double())
    assert far(kernels.swiglu(gate, up), expected.detach()) < limit
    for ours, theirs in zip(kernels.swiglu_backward(d_out, gate, up), grads, strict=True):
        assert far(ours, theirs) < limit
    logits, labels = 4 * drawn(TOKENS, VOCABULARY, dtype=dtype), torch.arange(TOKENS).to(x.device)
    weights = drawn(TOKENS, 1, seed=4).abs()
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, labels, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights[:, 0].double()).sum(), wide)
    assert far(kernels.losses(logits, labels[:, None], weights), expected.detach()) < limit
    assert far(logits, gradient) < limit


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_rotates_on_cuda(drawn, dtype) -> None:
    kernels = kernels_named("triton")
    q, k = drawn(TOKENS, HEADS, WIDTH, dtype=dtype), drawn(TOKENS, GROUPS, WIDTH, dtype=dtype)
    angles = drawn(TOKENS, WIDTH // 2, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(q), angles.sin().to(q)
    for x, out in zip((q, k), kernels.rotate(q, k, cos, sin, False), strict=True):
        first, second = x.double().chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        expected = x.double() * cos.double()[:, None] + turned * sin.double()[:, None]
        assert far(out, expected) < CLOSE[dtype]


def test_quantised_products_on_cuda(drawn, device) -> None:
    """Oracle: the dequantised weight in fp32."""
    if reason := fp8_obstacle(device, torch.bfloat16):
        pytest.skip(reason)
    weight, x, g = (drawn(*size, dtype="bf16") for size in ((512, 256), (77, 256), (77, 512)))
    quantised = Fp8Weight.of(weight, kernels_named("triton"))
    values = quantised.float()
    assert 0 < far(values, weight) < 0.03
    rows = quantised.kernels.quantise(x, None)
    for parts in (None, (0, 20, 77)):
        assert 0 < far(quantised.product(*rows, torch.bfloat16, parts), x.float() @ values.T) < 0.04
        assert 0 < far(quantised.gradient(g, parts), g.float() @ values) < 0.04


def test_nf4_on_cuda_is_nf4_on_a_cpu(drawn) -> None:
    pytest.importorskip("bitsandbytes")
    weight = drawn(256, 192, dtype="bf16")
    there, here = Nf4Weight.of(weight), Nf4Weight.of(weight.cpu())
    assert far(there.float().cpu(), here.float()) < 1e-3
    assert 0.02 < far(there.float(), weight) < 0.15


@pytest.mark.parametrize("weights", ["fp8", "nf4"])
def test_weights_are_quantised_on_cuda_as_they_arrive(drawn, device, tmp_path, weights) -> None:
    """They are those of a weight that lies there, and of each file one lies there unquantised."""
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    elif reason := fp8_obstacle(device, torch.bfloat16):
        pytest.skip(reason)
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    content = [
        {f"{n}.up_proj.weight": drawn(2048, HIDDEN, seed=n, dtype="bf16").cpu() for n in group}
        for group in (range(8), range(8, 16))
    ]
    for file, tensors in zip(files, content, strict=True):
        save_file(tensors, file)
    quantiser = quantiser_of(weights, "triton")
    assert quantiser is not None
    destination = Destination(device=device, dtype=torch.bfloat16, quantiser=quantiser)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with Reading(files, tmp_path, destination=destination) as reading:
        held = reading.held()
    one = 2 * 2048 * HIDDEN
    left = torch.cuda.memory_allocated(device) - before
    assert left < 0.52 * len(files) * 8 * one
    assert torch.cuda.max_memory_allocated(device) - before < left + 1.1 * len(files) * one
    assert held is not None
    for name, weight in {**content[0], **content[1]}.items():
        expected = quantiser.of(weight.to(device)).float()
        assert torch.equal(held.tensors[name].float(), expected)


@pytest.mark.parametrize("lengths", [(1100, 1300), (1, 64, 200, 200, 37)])
@pytest.mark.parametrize("kernel", [one for one in KERNELS if one != "eager"])
def test_attention_is_eager_attention_on_cuda(drawn, device, kernel, lengths) -> None:
    if reason := obstacle(kernel, device, torch.bfloat16):
        pytest.skip(reason)
    batch = pack([sample(length, place) for place, length in enumerate(lengths)])
    shapes = [(HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, WIDTH), (HEADS, WIDTH)]
    qkvd = [
        drawn(batch.tokens, *shape, seed=seed, dtype="bf16") for seed, shape in enumerate(shapes)
    ]

    def run(name: str, *, apart: bool) -> list[Tensor]:
        q, k, v = (t.clone().requires_grad_() for t in qkvd[:3])
        out = attend(q, k, v, 0.1, Packing.of(batch, name, device, apart=apart))
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), qkvd[3])]

    expected = run("eager", apart=False)
    for apart in (False, True):
        for ours, theirs in zip(run(kernel, apart=apart), expected, strict=True):
            assert far(ours, theirs) < 2e-2


def sample(length: int, unit: int) -> Encoded:
    generator = torch.Generator().manual_seed(1000 * unit + length)
    ids = torch.randint(5, 900, (length,), generator=generator).tolist()
    return Encoded(input_ids=tuple(ids), answer_start=max(1, length // 2), unit=unit)


def opened(dtype: str, **choices: str) -> Session:
    session = open_session(
        resolve_backbone("tiny"), AdapterSpec(rank=16), device="cuda", dtype=dtype, **choices
    )
    generator = torch.Generator(session.torch_device).manual_seed(7)
    session.adapter.flat.normal_(0.0, 0.02, generator=generator)
    return session


def test_the_gradient_of_b_is_that_of_plain_torch_on_cuda() -> None:
    data, gradients = [sample(length, length) for length in (24, 90, 313)], []
    for kernels in ("torch", "triton"):
        session = opened("fp32", kernels=kernels, attention="sdpa")
        BatchGradient(data, TrainConfig(batch_size=3), "x")(session, 0)
        gradients.append(session.adapter.flat_grad.clone())
    assert far(gradients[1], gradients[0]) < 2e-5


def units(session: Session, group: Sequence[Encoded], *, apart: bool) -> Tensor:
    out_UP = torch.zeros(len(group), session.adapter.flat.numel(), device=session.torch_device)
    add_unit_gradients(session, pack(group), range(len(group)), out_UP, apart=apart)
    return out_UP


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
@pytest.mark.parametrize("attention", ["auto", "torch-flash"])
def test_a_patients_gradient_on_cuda_is_its_own(device, weights, attention) -> None:
    """Whatever is beside it, before or behind: others of any number and length, or none."""
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    choose_weights(weights, device, torch.bfloat16)
    session = opened("bf16", weights=weights, attention=attention)
    one, others = sample(200, 0), [sample(length, 9 + length) for length in (7, 64, 200, 513)]
    alone, again = (units(session, [one], apart=True)[0] for _ in range(2))
    assert float(alone.norm()) > 0
    noise = far(again, alone)  # of kernels that add in any order
    for group, place in (([one, others[0]], 0), ([*others, one], 4), ([*others, one, *others], 4)):
        beside = units(session, group, apart=True)[place]
        assert far(beside, alone) <= max(1e-6, 2 * noise)
