"""FA-LoRA against PEFT's LoRA with the same A and B."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.model.adapter.falora import Adapter, AdapterSpec, attach, draw_a

TARGETS = ("q_proj", "v_proj")


def pair(targets: tuple[str, ...] = TARGETS, mode: str = "fa-lora", rank: int = 4, bias=False):
    """One random Llama with our adapter, its copy with PEFT's, same A, same random B."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    reference = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=rank, lora_alpha=10, target_modules=list(targets), lora_dropout=0.0),
    )
    adapter = attach(model, AdapterSpec(targets=targets, rank=rank, alpha=10.0, seed=5, mode=mode))
    generator = torch.Generator().manual_seed(1)
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=generator) * 0.1)
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for module in adapter.modules:
            prefix = f"base_model.model.{module.key}."
            parameters[prefix + "lora_A.default.weight"].copy_(module.lora_A)
            parameters[prefix + "lora_B.default.weight"].copy_(module.lora_B)
    return model, adapter, reference, parameters


def run(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    loss.backward()
    return logits


@pytest.mark.parametrize(
    ("targets", "mode", "bias"),
    [
        (TARGETS, "fa-lora", False),
        (TARGETS, "lora", True),
        (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "lora", 0),
        (("k_proj", "down_proj"), "fa-lora", True),
    ],
)
def test_logits_and_gradients_equal_pefts(targets, mode, bias):
    model, adapter, reference, parameters = pair(targets, mode, bias=bool(bias))
    ids = torch.randint(0, 97, (1, 23), generator=torch.Generator().manual_seed(2))
    ours, theirs = run(model, ids), run(reference, ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    expected = {}
    for module in adapter.modules:
        prefix = f"base_model.model.{module.key}."
        expected[module.key + ".lora_B"] = parameters[prefix + "lora_B.default.weight"].grad
        if mode == "lora":
            expected[module.key + ".lora_A"] = parameters[prefix + "lora_A.default.weight"].grad
    whole = torch.cat([expected[key].flatten() for key in adapter.shapes])
    assert (adapter.flat_grad - whole).norm() / whole.norm() < 1e-5
    for key in adapter.shapes:
        ours = adapter.flat_grad[adapter.slices[key]].view(adapter.shapes[key])
        assert expected[key].norm() > 1e-3
        assert (ours - expected[key]).norm() / expected[key].norm() < 1e-4, key


def test_merged_weights_give_the_same_logits():
    model, adapter, _, _ = pair()
    ids = torch.randint(0, 97, (1, 23), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with adapter.merged():
            merged = model(input_ids=ids).logits
        torch.testing.assert_close(merged, plain, rtol=0, atol=1e-5)
        adapter.flat.zero_()
        assert not torch.allclose(model(input_ids=ids).logits, plain, atol=1e-3)


def test_trainable_parameters_are_b_and_nothing_else():
    model, adapter, _, _ = pair()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter.shapes)
    assert all(key.endswith(".lora_B") for key in adapter.shapes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (32 + 16) * 4
    assert adapter.trainable_parameters == 3 * (32 + 16) * 4


def test_mode_lora_names_a_on_the_wire():
    _, adapter, _, _ = pair(mode="lora")
    assert {key.rsplit(".", 1)[-1] for key in adapter.shapes} == {"lora_A", "lora_B"}
    assert adapter.trainable_parameters == 3 * ((32 + 16) * 4 + 2 * 4 * 32)


def test_a_has_pefts_distribution():
    spec = AdapterSpec(rank=64, seed=11)
    ours = torch.from_numpy(draw_a(spec, "model.layers.0.self_attn.q_proj", 512)).flatten()
    torch.manual_seed(0)
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(512, 512),
        "default",
        peft.LoraConfig(r=64),
        r=64,
    )
    theirs = layer.lora_A["default"].weight.detach().flatten()
    # Same support, and two-sample Kolmogorov-Smirnov below its 0.1% critical value.
    assert abs(float(ours.abs().max()) - float(theirs.abs().max())) < 1e-4
    grid = torch.linspace(-0.05, 0.05, 2001)
    ours_cdf = torch.searchsorted(ours.sort().values, grid) / len(ours)
    theirs_cdf = torch.searchsorted(theirs.sort().values, grid) / len(theirs)
    assert float((ours_cdf - theirs_cdf).abs().max()) < 1.95 * (2 / len(ours)) ** 0.5


@pytest.mark.parametrize(("rank", "expected"), [(32, 5_242_880), (16, 2_621_440)])
def test_llama_8b_shape_has_the_papers_parameter_count(rank, expected):
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapter = attach(model, AdapterSpec(rank=rank))
    assert isinstance(adapter, Adapter)
    assert adapter.trainable_parameters == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
