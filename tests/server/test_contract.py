"""Hostile or broken hospitals against the real server app.

Each is refused by name with its reason, the round goes on while the quorum stands, and the result
is that of the others alone: compared with a run in which that hospital fails, and with a mean
computed here from the bytes on the wire.
"""

import io
import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from tampering import in_handshake, on, silent

from common.errors import RunFailed
from common.provenance import tensors_sha256
from common.wire.codecs import encode
from common.wire.contract import ContractError, read_train_reply, train_reply

HOSTILE = 1
NAME = "hospital-2"


def changed(reply, *, arrays=None, **metrics):
    """Return a reply to a train message with other arrays or other scalars."""
    content = reply.content
    record = ArrayRecord(dict(arrays)) if arrays is not None else content["arrays"]
    scalars = {**content["metrics"], **{k.replace("_", "-"): v for k, v in metrics.items()}}
    return RecordDict({"arrays": record, "metrics": MetricRecord(scalars)})


def on_train(make):
    """Tamper with replies to train messages only."""
    return on("train", lambda m, r: Message(make(r, dict(r.content["arrays"])), reply_to=m))


def first(arrays):
    return sorted(arrays)[0]


def with_value(arrays, value):
    key = first(arrays)
    return {**arrays, key: Array(value(arrays[key].numpy().copy()))}


def poisoned(number):
    def put(array):
        array[0, 0] = number
        return array

    return lambda reply, arrays: changed(reply, arrays=with_value(arrays, put))


def scaled(array, factor):
    return Array((array.numpy() * factor).astype(np.float32))


def with_data(data, stype="numpy.ndarray"):
    """The first B's label stays honest, its bytes do not."""

    def make(reply, arrays):
        shape = arrays[first(arrays)].shape
        hostile = Array(dtype="float32", shape=shape, stype=stype, data=data(arrays))
        return changed(reply, arrays={**arrays, first(arrays): hostile})

    return on_train(make)


def npz(arrays):
    file = io.BytesIO()
    np.savez(file, b=arrays[first(arrays)].numpy())
    return file.getvalue()


def header_of(shape, *, as_long_as_honest=True):
    """An .npy header that promises ``shape``; the file is as long as an honest one."""

    def data(arrays):
        file = io.BytesIO()
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue() + arrays[first(arrays)].numpy().tobytes() * as_long_as_honest

    return data


def broken_header(arrays):
    honest = arrays[first(arrays)].data
    return honest.replace(b"'descr'", b"(((((((")


def without_first(reply, arrays):
    return changed(reply, arrays={k: v for k, v in arrays.items() if k != first(arrays)})


def a_instead_of_b(reply, arrays):
    key = first(arrays)
    rest = {k: v for k, v in arrays.items() if k != key}
    return changed(reply, arrays={**rest, key.replace("lora_B", "lora_A"): arrays[key]})


HOSTILES = {
    "nan": (on_train(poisoned(np.nan)), "holds NaN or infinity"),
    "inf": (on_train(poisoned(np.inf)), "holds NaN or infinity"),
    "missing key": (on_train(without_first), "is missing"),
    "extra key": (
        on_train(
            lambda r, a: changed(r, arrays={**a, "model.layers.9.x.lora_B": Array(np.zeros(2))})
        ),
        "is unknown",
    ),
    "an A key": (on_train(a_instead_of_b), "is not a B matrix"),
    "wrong shape": (
        on_train(lambda r, a: changed(r, arrays=with_value(a, lambda x: x.T.copy()))),
        "shape",
    ),
    "broadcastable shape": (
        on_train(lambda r, a: changed(r, arrays=with_value(a, lambda x: x[:1].copy()))),
        "shape",
    ),
    "wrong dtype": (
        on_train(lambda r, a: changed(r, arrays=with_value(a, lambda x: x.astype(np.float64)))),
        "dtype float64",
    ),
    "weight zero": (on_train(lambda r, a: changed(r, weight=0.0)), "weight"),
    "weight negative": (on_train(lambda r, a: changed(r, weight=-3.0)), "weight"),
    "weight nan": (on_train(lambda r, a: changed(r, weight=float("nan"))), "'weight' is not fin"),
    "old round": (
        on_train(lambda r, a: changed(r, round=r.content["metrics"]["round"] - 1.0)),
        "answers round",
    ),
    "foreign source digest": (in_handshake(**{"source-sha256": "e" * 64}), "source fingerprint"),
    "foreign backbone": (in_handshake(**{"backbone-sha256": "e" * 64}), "backbone fingerprint"),
}
MORE = {
    "a second array record": (
        on_train(lambda r, a: RecordDict({**changed(r), "more": ArrayRecord({})})),
        "2 array records",
    ),
    "a scalar that is not allowed": (
        on_train(lambda r, a: changed(r, patient=10.0)),
        "'patient' is not allowed",
    ),
    "a dtype label that lies": (
        on_train(
            lambda r, a: changed(
                r,
                arrays={
                    **a,
                    first(a): Array(
                        dtype="float32",
                        shape=a[first(a)].shape,
                        stype=a[first(a)].stype,
                        data=Array(a[first(a)].numpy().astype(np.float64)).data,
                    ),
                },
            )
        ),
        "its data is not",
    ),
    "data that cannot be read": (
        on_train(
            lambda r, a: changed(
                r,
                arrays={
                    **a,
                    first(a): Array(
                        dtype="float32", shape=a[first(a)].shape, stype="numpy.ndarray", data=b"x"
                    ),
                },
            )
        ),
        "cannot be read",
    ),
    "a broken zip": (with_data(lambda a: b"PK\x03\x04garbage"), "cannot be read"),
    "an archive": (with_data(npz), "cannot be read"),
    "a header of 2**45 numbers": (with_data(header_of((2**45,))), "its data is not"),
    "a header of 2**70 numbers": (with_data(header_of((2**70,))), "its data is not"),
    "a header without data": (
        with_data(header_of((2**45,), as_long_as_honest=False)),
        "its data is not",
    ),
    "a header that is no literal": (with_data(broken_header), "cannot be read"),
    "no data": (with_data(lambda a: b""), "cannot be read"),
    "another serialisation": (
        with_data(lambda a: a[first(a)].data, stype="pickle"),
        "cannot be read",
    ),
    "a round and a half": (
        on_train(lambda r, a: changed(r, round=r.content["metrics"]["round"] + 0.5)),
        "answers round",
    ),
    "a weight that overflows": (on_train(lambda r, a: changed(r, weight=1e300)), "'weight' is be"),
    "a B of 1e30": (on_train(poisoned(1e30)), "beyond 1e+09"),
    "a B a thousand times too far": (
        on_train(lambda r, a: changed(r, arrays={k: scaled(v, 1000.0) for k, v in a.items()})),
        "times as far as the round's median",
    ),
    "foreign number of samples": (in_handshake(**{"train-samples": 10**12}), "integer from 0 to"),
    "a crash": (silent("train"), "no answer"),
}


@pytest.fixture(scope="module")
def expected_sha(request):
    return {}


def without_the_hospital(tiny_config, in_process, cache):
    """The run in which the hospital does not answer train messages; once per module."""
    if "sha" not in cache:
        config = tiny_config(federation__timeout_seconds=0.2)
        cache["sha"] = in_process(config, tamper={HOSTILE: silent("train")}).sha
    return cache["sha"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*HOSTILES, *MORE])
def test_hostile_hospital_is_refused(kind, tiny_config, in_process, expected_sha, caplog):
    tamper, reason = {**HOSTILES, **MORE}[kind]
    timeout = 0.2 if kind == "a crash" else 0.0
    config = tiny_config(federation__mismatch="refuse", federation__timeout_seconds=timeout)
    done = in_process(config, tamper={HOSTILE: tamper})
    refused = done.refused()
    assert {name for _, name, _ in refused} == {NAME}
    assert all(reason in text for _, _, text in refused)
    at = [0] if kind.startswith("foreign") else [1, 2]
    assert [number for number, _, _ in refused] == at
    assert any(NAME in line and reason in line for line in caplog.messages)
    assert done.run.status().state == "finished"
    assert done.sha == without_the_hospital(tiny_config, in_process, expected_sha)


def test_evaluation_that_overflows_is_refused(tiny_config, in_process):
    def huge(message, reply):
        scalars = {**reply.content["metrics"], "loss": 1e308}
        return Message(RecordDict({"metrics": MetricRecord(scalars)}), reply_to=message)

    done = in_process(tiny_config(), tamper={HOSTILE: on("evaluate", huge)})
    assert [name for _, name, _ in done.refused()] == [NAME] * 3
    assert done.sha == in_process(tiny_config()).sha


@pytest.mark.parametrize("half", [6e8, 3e38])
def test_change_that_leads_too_far_is_refused(half):
    """With a lossy codec a change may be allowed where the B that it leads to is not."""
    shape = (2, 2)
    big = np.full(shape, half, dtype=np.float32)
    reply = train_reply(
        {"b": encode("bf16", big)},
        {"round": 1.0, "weight": 1.0, "train-loss": 1.0, "steps": 1.0, "seconds": 1.0},
    )
    with pytest.raises(ContractError, match="beyond 1e\\+09"), np.errstate(over="ignore"):
        read_train_reply(
            reply, {"b": shape}, hospital=NAME, server_round=1, codec="bf16", base={"b": big}
        )


def test_honest_run_differs_from_the_run_without_the_hospital(
    tiny_config, in_process, expected_sha
):
    """Otherwise the comparison above could not fail."""
    honest = in_process(tiny_config())
    assert honest.refused() == []
    assert honest.sha != without_the_hospital(tiny_config, in_process, expected_sha)


def test_aggregate_is_the_mean_of_what_travelled(tiny_config, in_process):
    """Weighted mean in fp64 by hand, from the bytes of the last round's replies."""
    done = in_process(tiny_config(federation__rounds=1))
    replies = []
    for index, message in done.grid.wire("up"):
        if message.metadata.message_type == "train":
            weight = message.content["metrics"]["weight"]
            arrays = {k: v.numpy() for k, v in message.content["arrays"].items()}
            replies.append((index, weight, arrays))
    total = sum(weight for _, weight, _ in replies)
    mean = {
        key: sum(
            w / total * a[key].astype(np.float64) for _, w, a in sorted(replies, key=lambda r: r[0])
        )
        for key in replies[0][2]
    }
    ours = done.run.load_checkpoint().b
    assert len(replies) == 3
    assert len({weight for _, weight, _ in replies}) > 1
    for key, value in mean.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-6, atol=1e-9)
    assert done.sha == tensors_sha256(ours)


@pytest.mark.parametrize(
    ("fact", "what"),
    [("a-sha256", "a"), ("backbone-sha256", "backbone"), ("source-sha256", "source")],
)
def test_mismatch_stops_the_run_and_names_both_values(fact, what, tiny_config, in_process):
    foreign = "e" * 64
    with pytest.raises(RunFailed) as error:
        in_process(tiny_config(), tamper={HOSTILE: in_handshake(**{fact: foreign})})
    text = str(error.value)
    assert text.startswith(f"{NAME}: {what} fingerprint differs")
    honest = in_process(tiny_config(federation__rounds=1))
    ours = next(m.content["config"][fact] for index, m in honest.grid.wire("up") if index == 0)
    assert foreign in text
    assert ours in text


def test_hospital_refuses_what_is_not_b(tiny_config, in_process):
    """The hospital checks the server's message in the same way: keys, shapes, scalars."""
    bad = {
        "an A": lambda c: c["arrays"].update(
            {"model.layers.0.self_attn.q_proj.lora_A": Array(np.zeros((4, 64), np.float32))}
        ),
        "a scalar": lambda c: c["config"].update({"prompt": "text"}),
        "a nan": lambda c: c["arrays"].update(
            {
                first(c["arrays"]): Array(
                    np.full_like(c["arrays"][first(c["arrays"])].numpy(), np.nan)
                )
            }
        ),
    }
    for change in bad.values():

        def spoil(grid, message, change=change):
            if message.metadata.message_type == "train":
                change(message.content)

        with pytest.raises(RunFailed, match="0 of 3 hospitals answered") as error:
            in_process(tiny_config(), on_message=spoil)
        assert "hospital-1: failed" in str(error.value)


def test_everything_on_the_wire_is_b_and_allowed_scalars(tiny_config, in_process):
    """Decode all messages: array keys are exactly the B's, scalars are on the list."""
    done = in_process(tiny_config())
    keys = {f"model.layers.{n}.self_attn.{p}_proj.lora_B" for n in (0, 1) for p in "qv"}
    lists = {
        ("down", "query"): {"round"},
        ("down", "train"): {"round"},
        ("down", "evaluate"): {"round"},
        ("up", "train"): {"round", "weight", "train-loss", "steps", "seconds"},
        ("up", "evaluate"): {"round", "weight", "loss"},
        ("up", "query"): {
            *("hospital", "of", "a-sha256", "backbone-sha256", "source-sha256"),
            *("patients", "samples", "train-samples", "validation-samples", "device"),
            *("dtype", "dtype-reason", "attention", "attention-reason"),
        },
    }
    lines = done.run.wire()
    assert len(lines) == len(done.grid.messages) >= 2 * 3 * (1 + 2)
    recorded = sorted(json.dumps([line.direction, line.bytes]) for line in lines)
    counted = []
    for direction, _, data in done.grid.messages:
        message = message_from_proto(ProtoMessage.FromString(data))
        kind, content = message.metadata.message_type, message.content
        arrays = list(content.array_records.values())
        scalars = [*content.metric_records.values(), *content.config_records.values()]
        assert len(scalars) == 1
        assert set(scalars[0]) == lists[direction, kind]
        has_arrays = kind == "train" or (direction, kind) == ("down", "evaluate")
        assert [set(record) for record in arrays] == ([keys] if has_arrays else [])
        size = sum(len(array.data) for record in arrays for array in record.values())
        counted.append(json.dumps([direction, size]))
    assert recorded == sorted(counted)
