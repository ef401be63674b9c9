"""A from its seed, the flat buffer, and what loading refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.model.adapter.falora import AdapterSpec, attach, draw_a
from common.model.backbone.tiny import tiny_model

SPEC = AdapterSpec(rank=4, alpha=8.0, seed=3)


def test_a_depends_on_seed_and_module_and_on_nothing_else():
    base = attach(tiny_model(), SPEC)
    again = attach(tiny_model().to(torch.bfloat16), replace(SPEC, mode="lora"))
    assert again.a_fingerprint == base.a_fingerprint
    for key, a_RD in base.drawn_a().items():
        np.testing.assert_array_equal(again.drawn_a()[key], a_RD)
    for other in (replace(SPEC, seed=4), replace(SPEC, alpha=4.0), replace(SPEC, rank=8)):
        assert attach(tiny_model(), other).a_fingerprint != base.a_fingerprint
    values = list(base.drawn_a().values())
    assert not np.array_equal(values[0], values[1])


def test_orthonormal_rows():
    spec = replace(SPEC, initialiser="orthonormal", rank=16)
    a_RD = draw_a(spec, "module", 64)
    np.testing.assert_allclose(a_RD @ a_RD.T, np.eye(16), atol=1e-5)
    assert np.array_equal(a_RD * 2**20, np.round(a_RD * 2**20))
    with pytest.raises(UserError, match="up to 8"):
        draw_a(spec, "module", 8)


def test_parameters_and_gradients_are_views_of_the_flat_buffers():
    adapter = attach(tiny_model(), SPEC)
    assert np.all(adapter.flat.numpy() == 0)
    adapter.flat.copy_(torch.arange(adapter.flat.numel(), dtype=torch.float32))
    adapter.flat_grad.fill_(2.0)
    by_key = {module.key + ".lora_B": module.lora_B for module in adapter.modules}
    flattened = torch.cat([by_key[key].detach().flatten() for key in adapter.shapes])
    assert torch.equal(flattened, adapter.flat)
    assert all(bool((parameter.grad == 2.0).all()) for parameter in by_key.values())
    assert list(adapter.shapes) == sorted(adapter.shapes)


def test_state_round_trip_and_refusals_leave_the_adapter_alone():
    adapter = attach(tiny_model(), SPEC)
    adapter.flat.normal_(generator=torch.Generator().manual_seed(0))
    state, kept = adapter.state(), adapter.flat.clone()
    key = next(iter(adapter.shapes))
    state[key][0, 0] += 1.0
    assert torch.equal(adapter.flat, kept)  # state() copies
    for broken in (
        {k: v for k, v in state.items() if k != key},
        state | {"model.layers.0.self_attn.q_proj.lora_A": state[key]},
        state | {key: state[key][:1]},
        state | {key: state[key].astype(np.float64)},
    ):
        with pytest.raises(ValueError, match=r"lora_[AB]"):
            adapter.load(broken)
        assert torch.equal(adapter.flat, kept)
    adapter.load(state)
    assert adapter.state()[key][0, 0] == state[key][0, 0]
    assert (adapter.flat != kept).sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"mode": "dora"}, "fa-lora"),
        ({"initialiser": "zeros"}, "kaiming-uniform"),
        ({"targets": ()}, "targets"),
    ],
)
def test_what_an_adapter_may_be(change, message):
    with pytest.raises(UserError, match=message):
        AdapterSpec(**change)


def test_an_unknown_target_names_what_there_is():
    with pytest.raises(UserError, match="q_proj"):
        attach(tiny_model(), AdapterSpec(targets=("query",)))


def test_a_second_adapter_on_one_model_is_refused():
    model = tiny_model()
    attach(model, SPEC)
    with pytest.raises(UserError, match="q_proj"):
        attach(model, SPEC)
