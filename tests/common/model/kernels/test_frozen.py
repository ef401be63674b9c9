"""fp8 weights against the same products of the values that they stand for."""

import pytest
import torch

from common.errors import UserError
from common.model.adapter import projections
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.kernels import frozen
from common.model.kernels.elementwise import TORCH
from common.model.kernels.frozen import Fp8Linear, Fp8Weight, choose_weights, shared_input
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
    modules = [Fp8Linear(layer, TORCH) if fp8 else layer for layer in layers]
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


def test_everything_of_a_layer_is_quantised_and_nothing_else(monkeypatch):
    session = opened(monkeypatch, "fp8")
    assert session.weights.value == "fp8"
    for layer in session.model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for child in module.children():
                held = (
                    child.quantised
                    if isinstance(child, Fp8Linear)
                    else child.weight
                    if hasattr(child, "weight")
                    else None
                )
                assert held is None or isinstance(held, Fp8Weight)
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


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "down_proj"), ("up_proj",)])
def test_projections_of_one_input_as_one_node(monkeypatch, weights, targets):
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
    assert spec.fingerprint_as("fp8") not in (spec.fingerprint, "")


def test_fp8_is_refused_where_it_cannot_run():
    cpu = torch.device("cpu")
    assert choose_weights("bf16", cpu, torch.float32).value == "fp32"
    with pytest.raises(UserError, match=r"model.weights=fp8 cannot run here: .*CUDA"):
        choose_weights("fp8", cpu, torch.bfloat16)
    with pytest.raises(UserError, match="model.weights='int4'"):
        choose_weights("int4", cpu, torch.bfloat16)
