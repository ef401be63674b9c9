"""fp8 and nf4 weights against the same products of the values that they stand for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.config import OWN_TEXT, TextConfig
from common.errors import UserError
from common.model.adapter import projections
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.kernels import frozen, nf4
from common.model.kernels.elementwise import TORCH
from common.model.kernels.frozen import (
    Fp8Weight,
    QuantisedLinear,
    choose_weights,
    shared_input,
)
from common.model.kernels.nf4 import Nf4Weight
from common.model.session import Session, open_session
from common.text.batches import Encoded, pack
from common.training.gradients import BatchGradient
from common.training.loop import TrainConfig

SIZES = (40, 9, 23)


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def opened(
    monkeypatch, weights: str = "bf16", targets=("q_proj", "v_proj"), **choices: str
) -> Session:
    """A tiny session with a B that matters; fp8 runs here by arithmetic in fp32."""
    monkeypatch.setattr(frozen, "fp8_obstacle", lambda device, dtype: "")
    choices = {"dtype": "fp32", **choices}
    session = open_session(
        resolve_backbone("tiny"),
        AdapterSpec(targets=targets),
        device="cpu",
        weights=weights,
        **choices,
    )
    session.adapter.flat.copy_(0.1 * drawn(session.adapter.flat.numel()))
    return session


def samples() -> list[Encoded]:
    return [
        Encoded(input_ids=tuple(range(5, 5 + size)), answer_start=size // 2, unit=unit)
        for unit, size in enumerate(SIZES)
    ]


def gradient(session: Session) -> torch.Tensor:
    BatchGradient(samples(), TrainConfig(batch_size=len(SIZES)), "x")(session, 0)
    return session.adapter.flat_grad.clone()


def test_both_products_are_those_of_the_quantised_weight():
    weight, x, g = drawn(48, 32), drawn(7, 32, seed=1), drawn(7, 48, seed=2)
    quantised = Fp8Weight.of(weight, TORCH)
    values = quantised.float()
    assert 0 < far(values, weight) < 0.03
    out = quantised.product(*TORCH.quantise(x, None), torch.float32)
    # What is left is the rounding of x, or of g: a sixteenth at most, 2.6% in the mean.
    assert 0 < far(out, x @ values.T) < 0.035
    assert 0 < far(quantised.gradient(g), g @ values) < 0.035


def test_a_gradient_s_rows_do_not_touch_each_other():
    quantised, g = Fp8Weight.of(drawn(48, 32), TORCH), drawn(7, 48)
    alone = quantised.gradient(g[2:3])
    g[3:] = torch.nan
    g[:2] *= 1e6
    assert torch.equal(quantised.gradient(g)[2:3], alone)


@pytest.mark.parametrize("fp8", [False, True])
def test_projections_of_one_input_sum_their_gradients(fp8):
    layers = [torch.nn.Linear(32, high).requires_grad_(False) for high in (48, 16)]
    modules = [
        QuantisedLinear(one, Fp8Weight.of(one.weight, TORCH)) if fp8 else one for one in layers
    ]
    x = drawn(7, 32).requires_grad_()
    together = shared_input(x, modules)
    upstream = [drawn(7, 48, seed=1), drawn(7, 16, seed=2)]
    (ours,) = torch.autograd.grad(together, x, upstream)
    apart = [module(x) for module in modules]
    (theirs,) = torch.autograd.grad(apart, x, upstream)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_b_stays_close(monkeypatch):
    exact, coarse = (gradient(opened(monkeypatch, weights)) for weights in ("bf16", "fp8"))
    # A model 64 wide averages little; at Llama-3.1-8B's shape the cosine is in
    # benchmarks/results/gpu_paper_run.json.
    assert 1e-3 < far(coarse, exact) < 0.3
    assert float(torch.cosine_similarity(coarse, exact, dim=0)) > 0.96


@pytest.mark.parametrize(("weights", "kind"), [("fp8", Fp8Weight), ("nf4", Nf4Weight)])
def test_everything_of_a_layer_is_quantised_and_nothing_else(monkeypatch, weights, kind):
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    session = opened(monkeypatch, weights)
    assert session.weights.value == weights
    for layer in session.model.model.layers:
        children = [*layer.self_attn.children(), *layer.mlp.children()]
        held = [child.weight for child in children if hasattr(child, "weight")]
        assert len(held) == 7
        assert all(isinstance(one, kind) for one in held)
    assert session.model.lm_head.weight.dtype == torch.float32
    assert session.adapter.flat.dtype == torch.float32
    with session.adapter.merged():
        merged = session.adapter.modules[0].merged_OD
        assert merged is not None
        assert merged.dtype == torch.float32


def test_the_last_layer_may_go_on_with_labelled_tokens_alone(monkeypatch):
    session = opened(monkeypatch)
    batch = pack(samples())
    everything = session.hidden_states(batch)[batch.label_positions_N]
    assert not session.shortens
    torch.testing.assert_close(session.hidden_states(batch, at=batch.label_positions_N), everything)
    whole = gradient(session)
    monkeypatch.setattr(Session, "shortens", True)
    assert far(gradient(session), whole) < 1e-6


@pytest.mark.parametrize("weights", ["bf16", "fp8", "nf4"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "down_proj"), ("up_proj",)])
def test_projections_of_one_input_as_one_node(monkeypatch, weights, targets):
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    apart = gradient(opened(monkeypatch, weights, targets=targets))
    monkeypatch.setattr(projections, "one_node", lambda x: True)
    session = opened(monkeypatch, weights, targets=targets)
    assert far(gradient(session), apart) < 2e-6
    with torch.inference_mode(), session.adapter.merged():
        session.hidden_states(pack(samples()))


@pytest.mark.parametrize("recompute", ["mlp", "half", "all"])
def test_recomputation_changes_nothing(monkeypatch, recompute):
    monkeypatch.setattr(Session, "shortens", True)
    plain = gradient(opened(monkeypatch, "fp8"))
    again = gradient(opened(monkeypatch, "fp8", recompute=recompute))
    assert torch.equal(again, plain)


def test_hospitals_must_agree_on_the_format():
    spec = resolve_backbone("tiny")
    assert spec.fingerprint_as("bf16") == spec.fingerprint_as("fp32") == spec.fingerprint
    formats = [spec.fingerprint_as(weights) for weights in ("bf16", "fp8", "nf4")]
    assert len(set(formats)) == 3


def test_hospitals_must_agree_on_the_prompt():
    spec = resolve_backbone("tiny")
    texts = [OWN_TEXT, TextConfig(system_prompt="x"), TextConfig(template="x\n{diagnoses}")]
    found = [spec.fingerprint_as(form, text) for form in ("bf16", "nf4") for text in texts]
    assert found[0] == spec.fingerprint
    assert len(set(found)) == 6


def test_fp8_is_refused_where_it_cannot_run():
    cpu = torch.device("cpu")
    assert choose_weights("bf16", cpu, torch.float32).value == "fp32"
    with pytest.raises(UserError, match=r"model.weights=fp8 cannot run here: .*CUDA"):
        choose_weights("fp8", cpu, torch.bfloat16)
    with pytest.raises(UserError, match="model.weights='int4'"):
        choose_weights("int4", cpu, torch.bfloat16)


# The sixteen levels of nf4: QLoRA (arXiv 2305.14314), appendix E.
LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


@pytest.mark.parametrize("size", [(96, 80), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_takes_the_nearest_of_the_papers_levels(dtype, size):
    pytest.importorskip("bitsandbytes")
    weight = drawn(*size).to(dtype)
    dense = Nf4Weight.of(weight).dense()
    assert (dense.dtype, dense.shape) == (dtype, size)
    blocks, found = (t.double().view(-1, 64) for t in (weight, dense))
    scales = found.abs().amax(1, keepdim=True)
    # A block's scale is its largest weight, itself in a byte: three parts in a hundred off.
    torch.testing.assert_close(scales, blocks.abs().amax(1, keepdim=True), rtol=0.03, atol=0)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    apart = (found / scales)[..., None] - levels
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    assert float(apart.abs().amin(-1).max()) < rounding
    nearest = ((blocks / scales)[..., None] - levels).abs().argmin(-1)
    assert float((nearest == apart.abs().argmin(-1)).double().mean()) > 0.97


def test_an_nf4_session_computes_with_the_weights_that_nf4_stands_for(monkeypatch):
    """Loss and gradient, to the last bit, of a plain session with those weights."""
    pytest.importorskip("bitsandbytes")
    session, plain = opened(monkeypatch, "nf4"), opened(monkeypatch)
    exact = gradient(plain)
    for module in plain.model.model.layers.modules():
        if hasattr(module, "weight") and module.weight.ndim == 2:
            module.weight.data.copy_(Nf4Weight.of(module.weight).dense())
    assert torch.equal(gradient(session), gradient(plain))
    assert 1e-3 < far(gradient(session), exact) < 0.6
    batch = pack(samples())
    with torch.inference_mode(), session.adapter.merged(), plain.adapter.merged():
        assert torch.equal(session.hidden_states(batch), plain.hidden_states(batch))


def test_a_weight_that_ends_inside_a_block():
    pytest.importorskip("bitsandbytes")
    weight = drawn(7, 13)
    dense = Nf4Weight.of(weight).dense()
    assert dense.shape == weight.shape
    assert far(dense, weight) < 0.12


def test_nf4_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(nf4.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nf4 cannot run here.*pip install 'bitsandbytes"):
        choose_weights("nf4", torch.device("cpu"), torch.float32)


@pytest.mark.process
def test_bitsandbytes_fetches_no_code_of_its_own(tmp_path):
    """It would ask a package named ``kernels`` for code from the hub."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "kernels.py").write_text("raise SystemExit('asked')")
    code = "from common.model.kernels.nf4 import blockwise; blockwise()"
    root = str(Path(__file__).resolve().parents[4])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
