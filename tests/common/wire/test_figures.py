"""What a scalar can carry: as many digits as are shown, and texts that are known beforehand."""

import contextlib
import itertools
import math
from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.choice import (
    DTYPE_NAMES,
    DTYPE_REASONS,
    OTHER_GRADIENT,
    attention_reasons,
    is_device,
    travelling_reason,
)
from common.errors import UserError
from common.model.kernels import attention, attention_cuda
from common.model.session import DTYPES, choose_dtype
from common.wire.contract import (
    ContractError,
    evaluate_reply,
    read_evaluate_reply,
    read_train_reply,
    train_reply,
)
from common.wire.figures import LARGEST_FIGURE, fault_of, rounded

HONEST = {"round": 1.0, "weight": 8.0, "train-loss": 1 / 3, "steps": 2.0, "seconds": 1234.56789}
SHAPES = {"x.lora_B": (1, 1)}
WIRE = {"x.lora_B": np.ones((1, 1), np.float32)}


def received(content):
    return read_train_reply(content, SHAPES, hospital="h", server_round=1).metrics


def with_scalars(content, **scalars):
    for key, value in scalars.items():
        content["metrics"][key.replace("_", "-")] = value
    return content


@given(st.floats(min_value=0, max_value=LARGEST_FIGURE))
def test_a_figure_has_eight_digits_and_the_server_takes_it(value):
    """Against decimal arithmetic: within half of the eighth digit, or of the seventh decimal."""
    figure = rounded(value)
    assert fault_of(figure) == ""
    places = 7 if value < 1 else 7 - math.floor(math.log10(value))
    step = Decimal(1).scaleb(-min(7, places))
    expected = Decimal(value).quantize(step, ROUND_HALF_EVEN)
    assert abs(Decimal(figure) - expected) <= step * Decimal("1.0001")
    assert abs(figure - value) <= 0.51 * float(step) + 1e-9 * value


def test_a_loss_carries_less_than_30_bits():
    """All figures that pass, counted: below one, and in each of six decades."""
    assert math.log2(10**7 + 6 * 9 * 10**7 + 1) < 30
    # Between two neighbouring figures none passes.
    for low, step in ((0.05, 1e-7), (0.5, 1e-7), (3.0, 1e-7), (20.0, 1e-6), (123_456.0, 0.01)):
        between = np.linspace(low, low + step, 1001)[1:-1]
        assert fault_of(rounded(low)) == fault_of(rounded(low + step)) == ""
        assert {fault_of(float(one)) for one in between} == {"is not rounded to 8 digits"}


def test_what_is_shown_stays_what_it_was():
    """Four decimals of 100,000 losses, with and without the rounding before."""
    losses = np.random.default_rng(0).uniform(0.01, 12, 100_000).tolist()
    changed = sum(f"{rounded(loss):.4f}" != f"{loss:.4f}" for loss in losses)
    assert changed <= 200  # about one in a thousand; with six digits some 4,000 change


def test_a_hospital_rounds_what_it_tells():
    metrics = received(train_reply(WIRE, HONEST))
    assert metrics == {**HONEST, "train-loss": 0.3333333, "seconds": 1234.5679}
    content = evaluate_reply({"round": 1.0, "loss": math.pi, "weight": 40.0})
    told = read_evaluate_reply(content, server_round=1, most_tokens=40)
    assert told == {"round": 1.0, "loss": 3.1415927, "weight": 40.0}


@pytest.mark.parametrize(
    ("scalars", "reason"),
    [
        ({"train_loss": 0.33333333}, "'train-loss' is not rounded"),
        ({"train_loss": math.nextafter(0.3333333, 1)}, "'train-loss' is not rounded"),
        ({"train_loss": 5e-324}, "'train-loss' is not rounded"),
        ({"train_loss": -0.0}, "'train-loss' is not rounded"),
        ({"train_loss": 2**40}, "'train-loss' is not a float"),
        ({"train_loss": 2e6}, "'train-loss' is beyond 1e\\+06"),
        ({"seconds": 1234.56789}, "'seconds' is not rounded"),
        ({"steps": 2}, "'steps' is not a float"),
        ({"round": 1}, "'round' is not a float"),
        ({"weight": 8}, "'weight' is not a float"),
    ],
)
def test_the_server_refuses_what_is_not_rounded(scalars, reason):
    with pytest.raises(ContractError, match=reason):
        received(with_scalars(train_reply(WIRE, HONEST), **scalars))


@pytest.mark.parametrize("value", [math.pi, -0.0, 3])
def test_the_server_refuses_a_validation_loss_that_is_not_rounded(value):
    content = evaluate_reply({"round": 1.0, "loss": math.pi, "weight": 40.0})
    with pytest.raises(ContractError, match="'loss' is not"):
        read_evaluate_reply(with_scalars(content, loss=value), server_round=1, most_tokens=40)


def test_every_reason_for_a_kernel_is_known_beforehand(monkeypatch):
    """All machines: with and without CUDA, old and new, with and without each package."""
    given_reasons = set()
    machines = itertools.product(
        ("cpu", "cuda"),
        (torch.float32, torch.bfloat16),
        ((7, 5), (8, 0), (9, 0)),
        ("", OTHER_GRADIENT, "tried, and refused (No engine (found))"),
        (set(), {"flash_attn"}, {"flash_attn_interface"}, {"torch.nn.attention.varlen"}),
        ("auto", *attention.KERNELS),
    )
    for device, dtype, capability, probed, packages, asked in machines:
        found = lambda name, packages=packages: name if name in packages else None  # noqa: E731
        monkeypatch.setattr(attention.importlib.util, "find_spec", found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setattr(attention_cuda, "_probe", lambda *_, probed=probed: probed)
        with contextlib.suppress(UserError):
            choice = attention.choose_attention(asked, torch.device(device), dtype)
            given_reasons.add(choice.reason)
    known = attention_reasons()
    assert {one for one in given_reasons if "No engine" not in one} <= known
    travelled = {travelling_reason(one) for one in given_reasons}
    assert travelled <= known
    assert {one for one in given_reasons if "No engine" in one}  # these lose their end
    assert len(travelled) >= 10


def test_every_reason_for_a_dtype_is_known_beforehand(monkeypatch):
    given_reasons = {choose_dtype("bf16", torch.device("cpu")).reason}
    for able in ({"amx_tile": True}, {"avx512_bf16": True}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        given_reasons.add(choose_dtype("auto", torch.device("cpu")).reason)
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **_: able)
        given_reasons.add(choose_dtype("auto", torch.device("cuda")).reason)
    assert given_reasons == DTYPE_REASONS
    assert set(DTYPES) == set(DTYPE_NAMES)


@pytest.mark.parametrize("name", ["cpu\n", "CPU", "cuda:", "cuda:123", "cuda:١", "mps", ""])
def test_no_other_device_is_one(name):
    assert not is_device(name)
