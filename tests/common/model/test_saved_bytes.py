"""Bytes that a decoder layer saves per token for the backward pass, counted beside PEFT's."""

import peft
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from common.choice import Choice
from common.errors import UserError
from common.model import memory
from common.model.adapter.falora import AdapterSpec, attach
from common.model.backbone.load import BackboneShape, resolve_backbone
from common.model.kernels import fused_layer as lean
from common.model.kernels.attention import Packing, register
from common.model.memory import choose_recompute, saved_bytes_per_token_layer
from common.model.session import Session, open_session
from common.text.batches import Encoded, pack

TOKENS = 64
# Llama-3.1-8B's proportions at an eighth of its width: 4 : 14 : 1 for hidden, MLP and key/value.
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
}


def saved_bytes(forward, parameters) -> int:
    """Sum the distinct storages saved for backward, without the model's own parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = []
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)  # alive, so that no address is used twice
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(storages.values())


def per_layer(build) -> float:
    """Bytes per token and layer: what four layers save beyond what two save."""
    counts = []
    for layers in (2, 4):
        forward, parameters = build(layers)
        counts.append(saved_bytes(forward, parameters))
    return (counts[1] - counts[0]) / 2 / TOKENS


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).to(torch.bfloat16)


def peft_model(layers: int, freeze_a: bool):
    model = llama(layers)
    model.set_attn_implementation("sdpa")
    # On Llama-3.1-8B, r = 16 is 1/256 of the width; PEFT as its users run it, fp32 adapters.
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=not freeze_a)
    if freeze_a:
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    ids = torch.randint(0, 128, (1, TOKENS))
    return lambda: wrapped(input_ids=ids, use_cache=False).logits.sum(), list(wrapped.parameters())


def our_model(layers: int, recompute: str = "none"):
    model = llama(layers)
    model.set_attn_implementation(register())
    adapter = attach(model, AdapterSpec(rank=2))
    lean.install(model, recompute)
    sample = Encoded(input_ids=tuple(range(TOKENS)), answer_start=1, unit=0)
    batch = pack([sample])
    packing = Packing.of(batch, "sdpa", torch.device("cpu"))
    own = [*model.parameters(), adapter.flat, *(m.lora_A for m in adapter.modules)]

    def forward():
        return model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=packing.bounds_device.view(1, 1, 1, -1),
            use_cache=False,
            packing=packing,
        ).last_hidden_state.sum()

    return forward, own


def test_saved_bytes_against_peft():
    ours = per_layer(our_model)
    default = per_layer(lambda layers: peft_model(layers, freeze_a=False))
    frozen = per_layer(lambda layers: peft_model(layers, freeze_a=True))
    assert ours / default <= 0.56, (ours, default)
    assert ours / frozen <= 0.69, (ours, frozen)


# An index's gradient is zeros of its input's size, and a copy into them.
WHOLE_COPIES = ("SelectBackward", "SliceBackward")


def nodes_of(out: torch.Tensor) -> set[str]:
    """Return the kinds of nodes of the graph that led to a tensor."""
    nodes, names = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [before for before, _ in node.next_functions if before]
    return names


def test_the_way_from_layer_to_layer_costs_the_backward_pass_no_copy():
    forward, _ = our_model(3)
    names = nodes_of(forward())
    assert "SqueezeBackward1" in names
    assert not {name for name in names if name.startswith(WHOLE_COPIES)}


@pytest.mark.parametrize("shortens", [False, True])
def test_nor_do_the_states_that_the_backbone_returns(monkeypatch, shortens):
    """On a CPU, and where the last layer goes on with the labelled tokens alone."""
    monkeypatch.setattr(Session, "shortens", shortens)
    session = open_session(
        resolve_backbone("tiny"), AdapterSpec(rank=2), device="cpu", dtype="fp32", threads=1
    )
    samples = [Encoded(input_ids=tuple(range(5, 25)), answer_start=12, unit=u) for u in (0, 1)]
    batch = pack(samples)
    for states in (session.hidden_states, session.label_states):
        names = nodes_of(states(batch))
        assert "SqueezeBackward1" in names
        assert not {name for name in names if name.startswith(WHOLE_COPIES)}


def test_each_recompute_choice_saves_less():
    none, mlp, half, everything = (
        per_layer(lambda layers, choice=choice: our_model(layers, choice))
        for choice in ("none", "mlp", "half", "all")
    )
    gate_and_up = 2 * 2 * SHAPE["intermediate_size"]
    assert none - mlp >= gate_and_up
    shape = BackboneShape.of(LlamaConfig(num_hidden_layers=4, **SHAPE))
    counted = {"none": none, "mlp": mlp, "half": half, "all": everything}
    for choice, found in counted.items():
        predicted = saved_bytes_per_token_layer(
            shape, AdapterSpec(rank=2), value_bytes=2, recompute=choice
        )
        assert predicted == found, choice
    assert everything == 2 * SHAPE["hidden_size"]  # each layer's input, in bf16
    assert abs(half - (none + everything) / 2) < 1


def test_recompute_is_chosen_by_memory(monkeypatch):
    shape = BackboneShape.of(LlamaConfig(num_hidden_layers=4, **SHAPE))
    whole = 1000 * 4 * 11_808

    def chosen(free, requested="auto", batch_tokens=1000):
        monkeypatch.setattr(memory, "_free_bytes", lambda _device: free)
        return choose_recompute(
            requested,
            shape=shape,
            adapter=AdapterSpec(rank=2),
            value_bytes=2,
            batch_tokens=batch_tokens,
            device=torch.device("cpu"),
        )

    assert chosen(10 * whole).value == "none"
    assert chosen(whole).value == "mlp"
    assert chosen(whole // 3).value == "all"
    assert "GiB free" in chosen(whole).reason
    assert chosen(1, batch_tokens=0).value == "none"
    assert chosen(1, requested="half") == Choice("half", "asked for")
    with pytest.raises(UserError, match="train.recompute"):
        chosen(1, requested="some")
