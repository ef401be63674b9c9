"""Packed batches on our layers against transformers' own layers, one sample at a time."""

import copy

import pytest
import torch
from plain_model import plain_gradient
from privacy_fixtures import random_samples
from transformers import LlamaForCausalLM

from common.configio import choices
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.backbone.tiny import tiny_config
from common.model.kernels.attention import KERNELS, Packing
from common.model.kernels.fused_layer import LeanLayer
from common.model.session import open_session
from common.text.batches import pack
from common.training.gradients import add_unit_gradients

LENGTHS = (150, 1, 33, 260)


def opened(dtype="fp32", recompute="none", attention="auto", spread=0.2, **adapter):
    session = open_session(
        resolve_backbone("tiny"),
        AdapterSpec(rank=4, alpha=4.0, **adapter),
        device="cpu",
        dtype=dtype,
        recompute=recompute,
        attention=attention,
    )
    generator = torch.Generator().manual_seed(7)
    session.adapter.flat.copy_(
        torch.randn(session.adapter.flat.shape, generator=generator) * spread
    )
    return session


def transformers_twin(session):
    """transformers' own Llama with the adapter's update folded into its weights."""
    twin = LlamaForCausalLM(tiny_config()).eval()
    state = {
        key: value
        for key, value in session.model.state_dict().items()
        if not key.endswith("lora_B")
    }
    for module in session.adapter.modules:
        update = session.adapter.spec.scale * module.lora_B.detach() @ module.lora_A.float()
        state[module.key + ".weight"] = module.weight.float() + update
    twin.load_state_dict(state, strict=False)
    return twin


@pytest.mark.parametrize(("attention", "lean"), [("sdpa", True), ("eager", True), ("sdpa", False)])
def test_packed_equals_one_by_one(attention, lean, monkeypatch):
    """Also where transformers' own layers stay, for a Llama that the lean layer does not know."""
    if not lean:
        monkeypatch.setattr("common.model.kernels.fused_layer.supported", lambda model: False)
    session = opened(attention=attention)
    assert all(isinstance(layer, LeanLayer) == lean for layer in session.model.model.layers)
    twin = transformers_twin(session)
    batch = pack(random_samples(LENGTHS))
    with torch.no_grad():
        packed = session.model.lm_head(session.hidden_states(batch))
        for place, sample in enumerate(random_samples(LENGTHS)):
            alone = twin(input_ids=torch.tensor([sample.input_ids])).logits[0]
            part = packed[batch.cu_seqlens[place] : batch.cu_seqlens[place + 1]]
            torch.testing.assert_close(part, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_derivative_crosses_samples(dtype, attention):
    session = opened(dtype, attention=attention)
    batch = pack(random_samples((150, 40, 33)))
    packing = Packing.of(batch, attention, torch.device("cpu"))
    embedded = session.model.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    hidden = session.model.model(
        inputs_embeds=embedded,
        position_ids=batch.position_ids,
        attention_mask=packing.bounds_device.view(1, 1, 1, -1),
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]
    hidden[150:190].float().square().sum().backward()
    gradient = embedded.grad[0]
    assert gradient[:150].abs().max() == 0
    assert gradient[190:].abs().max() == 0
    assert gradient[150:190].abs().min(1).values.max() > 0


EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("recompute", "adapter"),
    [
        ("none", {}),
        ("mlp", {}),
        ("half", {"mode": "lora"}),
        ("all", {}),
        ("mlp", {"targets": EVERYWHERE, "mode": "lora"}),
        ("none", {"targets": EVERYWHERE}),
    ],
)
def test_gradients_equal_transformers_whatever_is_recomputed(recompute, adapter):
    session = opened(recompute=recompute, **adapter)
    assert session.recompute.value == recompute
    units = random_samples((150, 40, 33))
    out_UP = torch.zeros(3, session.adapter.trainable_parameters)
    add_unit_gradients(session, pack(units), range(3), out_UP)
    # The plain way: the same modules under transformers' own layers, one sample at a time.
    for place, sample in enumerate(units):
        expected = plain_gradient(session, sample)
        assert (out_UP[place] - expected).norm() / expected.norm() < 2e-6


def test_bf16_gradients_stay_near_fp32():
    """Our bf16 backward may err no more than torch's own in bf16 (twice, for luck)."""
    units = random_samples((150, 400, 33))
    gradients = {}
    for name, dtype in (("ours", "bf16"), ("exact", "fp32")):
        session = opened(dtype)
        gradients[name] = torch.zeros(3, session.adapter.trainable_parameters)
        add_unit_gradients(session, pack(units), range(3), gradients[name])
    session = opened("bf16")
    for place, sample in enumerate(units):
        plain = plain_gradient(session, sample)
        exact = gradients["exact"][place]
        ours = (gradients["ours"][place] - exact).norm() / exact.norm()
        theirs = (plain - exact).norm() / exact.norm()
        assert ours < 2 * theirs + 1e-3


def test_generation_with_a_cache_equals_no_cache():
    session = opened()
    ids = torch.tensor([random_samples((20,))[0].input_ids])
    with torch.no_grad():
        with_cache = session.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
        without = copy.deepcopy(ids)
        for _ in range(with_cache.shape[1] - ids.shape[1]):
            logits = session.model(input_ids=without, use_cache=False).logits[0, -1]
            without = torch.cat([without, logits.argmax()[None, None]], 1)
    assert with_cache.tolist() == without.tolist()


def test_kernel_names_are_those_of_the_configuration():
    from dataclasses import fields

    from common.config import ModelConfig

    option = next(field for field in fields(ModelConfig) if field.name == "attention")
    assert set(choices(option)) == {"auto", *KERNELS}
