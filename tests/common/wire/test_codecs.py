"""Wire codecs: exactness, size on real messages, error feedback, and what the server refuses."""

import math
import shutil

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client.handlers import in_codec
from common.wire.codecs import BLOCK, compress, decode, encode, wire_layout
from common.wire.contract import ContractError, check_arrays, describe, to_record, train_message

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
TENSORS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=40), elements=FINITE)


@given(TENSORS)
def test_fp32_is_exact(value):
    np.testing.assert_array_equal(decode("fp32", encode("fp32", value), value.shape), value)


@given(TENSORS)
def test_bf16_rounds_as_torch_does(value):
    read = decode("bf16", encode("bf16", value), value.shape)
    expected = torch.from_numpy(value).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(read, expected)


@given(hnp.arrays(np.float32, st.integers(1, 700), elements=st.floats(-1e6, 1e6, width=32)))
def test_int8_is_within_half_a_step_of_each_block(value):
    wire = encode("int8", value)
    dtype, layout = wire_layout("int8", value.shape)
    assert (wire.dtype, wire.shape) == (dtype, layout)
    read = decode("int8", wire, value.shape)
    for start in range(0, value.size, BLOCK):
        block = slice(start, start + BLOCK)
        step = np.abs(value[block]).max() / 127
        assert np.abs(read[block] - value[block]).max() <= 0.51 * step + 1e-37


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_error_feedback_loses_nothing_for_good(codec):
    """The sum of what was read differs from the sum of what was meant by the last debt alone."""
    generator = np.random.default_rng(0)
    carried, meant, read = {}, 0.0, 0.0
    for _ in range(50):
        value = generator.normal(size=(30, 20)).astype(np.float32)
        wire, carried = compress(codec, {"b": value}, carried)
        meant, read = meant + value, read + decode(codec, wire["b"], value.shape)
    np.testing.assert_allclose(meant - read, carried["b"], atol=1e-4)
    one_step = np.abs(value).max() / 127
    assert np.abs(carried["b"]).max() < 2 * one_step


def test_a_hospital_carries_its_rounding_over_rounds(tiny_config, tmp_path):
    """The same change each round: without the debt the same rounding would add up."""
    config = tiny_config(federation__codec="int8")
    base = {"b": np.zeros((30, 20), np.float32)}
    change = np.random.default_rng(0).normal(size=(30, 20)).astype(np.float32)
    read, rounds = 0.0, 40
    for server_round in range(1, rounds + 1):
        wire = in_codec(config, tmp_path, {"b": change}, base, server_round)
        read = read + decode("int8", wire["b"], change.shape)
    one_step = np.abs(change).max() / 127
    assert np.abs(rounds * change - read).max() < one_step


def llama_8b_shapes(rank=16):
    shapes = {}
    for layer in range(32):
        stem = f"model.layers.{layer}.self_attn"
        shapes[f"{stem}.q_proj.lora_B"] = (4096, rank)
        shapes[f"{stem}.v_proj.lora_B"] = (1024, rank)
    return shapes


@pytest.mark.parametrize(("codec", "goal"), [("fp32", 0.385), ("bf16", 0.193), ("int8", 0.10)])
def test_bytes_of_a_real_message_against_lora_in_fp32(codec, goal):
    """Serialised as Flower does, at Llama-3.1-8B's shapes, against A and B in fp32."""
    from flwr.common.serde import message_to_proto

    shapes = llama_8b_shapes()
    generator = np.random.default_rng(1)
    b = {key: generator.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    content = train_message(compress(codec, b, {})[0], server_round=1)
    message = Message(content=content, dst_node_id=1, message_type="train")
    size = len(message_to_proto(message).SerializeToString())
    lora = sum(4 * (math.prod(s) + 4096 * s[1]) for s in shapes.values())
    where = {"direction": "down", "hospital": "north", "server_round": 1, "kind": "train"}
    carried = describe(message, (), **where).bytes
    assert carried / lora <= goal
    assert carried <= size <= carried + 20_000


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_federation_trains_resumes_and_tells_its_bytes(codec, tiny_config, in_process, copy_run):
    config = tiny_config(federation__codec=codec, federation__rounds=3)
    done = in_process(config)
    losses = done.summary["validation_loss"]
    exact = in_process(tiny_config(federation__rounds=3))
    assert losses[-1] < losses[0]
    assert (done.sha == exact.sha) == (codec == "fp32")
    assert losses[-1] == pytest.approx(exact.summary["validation_loss"][-1], rel=0.01)
    assert in_process(config, order=np.random.default_rng(0)).sha == done.sha
    run = copy_run(done.run)

    shutil.rmtree(run.path / "checkpoints" / "round-00003")
    assert in_process(run.config(), resume=run).sha == done.sha


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_server_refuses_what_does_not_decode(codec):
    shapes = {"x.lora_B": (3, 4)}
    value = {"x.lora_B": np.ones((3, 4), np.float32)}
    good = to_record(compress(codec, value, {})[0])
    np.testing.assert_allclose(check_arrays(good, shapes, codec)["x.lora_B"], 1.0, rtol=1e-2)
    with pytest.raises(ContractError, match="dtype float32"):
        check_arrays(to_record(value), shapes, codec)
    wire = good["x.lora_B"].numpy().copy()
    if codec == "bf16":
        wire[0, 0] = np.array(0x7F80, dtype="<u2").view("<i2")  # infinity
    else:
        wire[12:] = np.array([np.nan], dtype="<f4").view("i1")  # the scale
    with pytest.raises(ContractError, match="holds NaN or infinity"):
        check_arrays(ArrayRecord({"x.lora_B": Array(wire)}), shapes, codec)
    with pytest.raises(ContractError, match="shape"):
        check_arrays(ArrayRecord({"x.lora_B": Array(wire[:2].copy())}), shapes, codec)
