"""Replies whose scalars are not what handshake and instruction determine, and long texts."""

import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

HOSTILE = 1
NAME = "hospital-2"


def on(kind, **scalars):
    """Replace scalars in the replies to one kind of message; a number or a function of it."""

    def tamper(message, reply):
        if message.metadata.message_type != kind:
            return reply
        metrics = dict(reply.content["metrics"])
        for key, value in scalars.items():
            name = key.replace("_", "-")
            metrics[name] = value(metrics[name]) if callable(value) else value
        content = RecordDict({**reply.content, "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    return tamper


LIES = {
    "a weight beyond its samples": ({"weight": 1e15}, "weight is not"),
    "one sample more": ({"weight": lambda w: w + 1}, "the training samples that it told"),
    "more steps": ({"steps": 3.0}, "steps are not the 2 that it was asked for"),
    "steps below zero": ({"steps": -5.0}, "steps are not the 2"),
    "seconds below zero": ({"seconds": -1.0}, "'seconds' is negative"),
    "a loss below zero": ({"train_loss": -3.0}, "'train-loss' is negative"),
    "a message in a loss": ({"train_loss": 3.0 + 2**-40}, "'train-loss' is not rounded to 8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIES)
def test_train_reply_that_lies_is_refused(kind, tiny_config, in_process):
    scalars, reason = LIES[kind]
    done = in_process(tiny_config(), tamper={HOSTILE: on("train", **scalars)})
    assert [(at, name) for at, name, _ in done.refused()] == [(1, NAME), (2, NAME)]
    assert all(reason in text for _, _, text in done.refused())
    assert {e.hospital for e in done.run.metrics("weight")} == {"hospital-1", "hospital-3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"train__epochs": 1.0}, {"train__steps": 5}, {"train__keep_state": False}]
)
def test_honest_replies_are_what_was_due(settings, tiny_config, in_process):
    done = in_process(tiny_config(federation__rounds=3, **settings))
    assert done.refused() == []
    assert len(done.run.metrics("steps")) == 9


EVALUATE_LIES = {
    "a loss below zero": ({"loss": -1.0}, "'loss' is negative"),
    "a message in a loss": ({"loss": 3.0 + 2**-40}, "'loss' is not rounded to 8"),
    "more tokens than there can be": ({"weight": 2 * 192 + 1.0}, "tokens up to 384"),
    "half a token": ({"weight": lambda w: w - 0.5}, "whole number of tokens"),
    "no token": ({"weight": 0.0}, "finite positive"),
    "another round": ({"round": lambda n: n + 1}, "answers round"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVALUATE_LIES)
def test_evaluate_reply_that_lies_is_refused(kind, tiny_config, in_process):
    scalars, reason = EVALUATE_LIES[kind]
    done = in_process(
        tiny_config(federation__rounds=1), tamper={HOSTILE: on("evaluate", **scalars)}
    )
    assert [(at, name) for at, name, _ in done.refused()] == [(0, NAME), (1, NAME)]
    assert all(reason in text for _, _, text in done.refused())
    told = [e for e in done.run.metrics("validation-loss") if e.hospital == NAME]
    assert told == []


def test_evaluate_reply_with_arrays_is_refused(tiny_config, in_process):
    def with_arrays(message, reply):
        if message.metadata.message_type == "evaluate":
            reply.content["arrays"] = message.content["arrays"]
        return reply

    done = in_process(tiny_config(federation__rounds=1), tamper={HOSTILE: with_arrays})
    reasons = [(at, name, text) for at, name, text in done.refused()]
    assert reasons == [(n, NAME, "1 array records, expected 0") for n in (0, 1)]


SECRET = "patient 10000032\n" + "x" * 1_000_000


def long_tensor_name(reply):
    arrays = dict(reply.content["arrays"])
    arrays["x" * 300 + SECRET] = next(iter(arrays.values()))
    return RecordDict({**reply.content, "arrays": ArrayRecord(arrays)})


def long_dtype(reply):
    arrays = dict(reply.content["arrays"])
    key, array = next(iter(arrays.items()))
    arrays[key] = Array(dtype=SECRET, shape=array.shape, stype=array.stype, data=array.data)
    return RecordDict({**reply.content, "arrays": ArrayRecord(arrays)})


def long_shape(reply):
    arrays = dict(reply.content["arrays"])
    key, array = next(iter(arrays.items()))
    shape = (1,) * 100_000
    arrays[key] = Array(dtype=array.dtype, shape=shape, stype=array.stype, data=array.data)
    return RecordDict({**reply.content, "arrays": ArrayRecord(arrays)})


def long_scalar_name(reply):
    metrics = {**reply.content["metrics"], "x" * 300 + SECRET: 1.0}
    return RecordDict({**reply.content, "metrics": MetricRecord(metrics)})


LONG = {
    "a tensor's name": (long_tensor_name, "is not a B matrix", 1),
    "a dtype": (long_dtype, "dtype patient 10000032 x", None),
    "a shape": (long_shape, "shape (1, 1, ", None),
    "a scalar's name": (long_scalar_name, "is not allowed", 1),
}


@pytest.mark.parametrize("kind", LONG)
def test_long_text_stays_out_of_the_logs(kind, tiny_config, in_process):
    make, reason, unknown = LONG[kind]

    def tamper(message, reply):
        train = message.metadata.message_type == "train"
        return Message(make(reply), reply_to=message) if train else reply

    done = in_process(tiny_config(federation__rounds=1), tamper={HOSTILE: tamper})
    ((_, _, text),) = done.refused()
    assert reason in text
    assert len(text) < 300
    wire = (done.run.path / "wire.jsonl").read_text()
    assert "10000032" not in wire
    assert max(map(len, wire.splitlines())) < 1000
    lines = [line for line in done.run.wire() if line.unknown is not None]
    assert [(line.hospital, line.unknown) for line in lines] == [(NAME, unknown)][
        : 1 if unknown else 0
    ]


@pytest.mark.parametrize("kind", ["query", "train"])
def test_long_reason_of_a_failure_is_cut(kind, tiny_config, in_process):
    def tamper(message, reply):
        if message.metadata.message_type != kind:
            return reply
        return Message(Error(code=2, reason="out of\nmemory " + "x" * 10**6), reply_to=message)

    config = tiny_config(
        federation__rounds=1, federation__mismatch="refuse", federation__min_hospitals=2
    )
    done = in_process(config, tamper={HOSTILE: tamper})
    for _, _, text in done.refused():
        assert "out of memory x" in text
        assert len(text) < 400
    assert done.refused()
