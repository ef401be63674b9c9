"""A federation of one hospital against the single-node mode: R rounds of S steps are R*S steps.

The federated side is the hospital's own code (``client.local_update``, its state on disk between
rounds) and the server's own aggregation; every round starts from what came out of the last.
"""

import numpy as np
import pytest

from client.kept_state import load_state, save_state
from client.local_update import LocalRound, update
from common.model.adapter.layout import initial_tensors
from common.training.worker import Worker
from common.wire.contract import Update
from server.strategy import Aggregator

SGD = {"train.optimizer": "sgd", "train.momentum": 0.9, "train.weight-decay": 0.01}
ADAMW = {"train.optimizer": "adamw", "train.weight-decay": 0.1}
DECAY = {"train.schedule": "cosine", "train.warmup-steps": 3, "train.max-grad-norm": 0.5}
LINEAR = {"train.schedule": "linear", "train.warmup-steps": 2, "train.accumulation": 2}


def federated(config, hospital, folder):
    """Run the rounds as hospital and server do, without Flower's transport."""
    session = Worker().session(config)
    scheme = session.adapter.spec.scheme
    aggregator = Aggregator(config.federation, scheme)
    b = initial_tensors(session.adapter.shapes, session.adapter.spec)
    for number in range(1, config.federation.rounds + 1):
        state = load_state(folder, before_round=number)
        result = update(LocalRound(session, hospital, b, state, config, number))
        save_state(folder, state, server_round=number)
        reply = Update(
            hospital=hospital.name,
            b=result.b,
            weight=result.metrics["weight"],
            metrics=result.metrics,
        )
        b |= aggregator.aggregate(scheme.shapes(number, b), [reply], server_round=number)
    return b


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {**SGD, "federation.rounds": 3, "federation.local-steps": 4},
        {**SGD, **DECAY, "federation.rounds": 3, "federation.local-steps": 4},
        {**ADAMW, **LINEAR, "federation.rounds": 4, "federation.local-steps": 3},
        {**ADAMW, **DECAY, "federation.rounds": 3, "train.steps": 11},
        {**ADAMW, **DECAY, "federation.rounds": 5, "train.epochs": 2.5},
        {**ADAMW, "adapter.mode": "lora", "federation.rounds": 3, "federation.local-steps": 4},
        {**ADAMW, "adapter.mode": "rolora", "federation.rounds": 3, "train.steps": 11},
    ],
    ids=["sgd", "sgd-cosine", "adamw-linear", "adamw-steps", "adamw-epochs", "lora", "rolora"],
)
def test_one_hospital_is_the_single_node(keys, configure, hospital, begin, tmp_path):
    config = configure(keys)
    b = federated(config, hospital, tmp_path / "hospital")
    training = begin(config)
    training.finish()
    alone = training.session.adapter.state()
    assert max(np.abs(value).max() for value in alone.values()) > 1e-3
    assert set(b) == set(alone)
    assert max(np.abs(b[key] - alone[key]).max() for key in b) <= 1e-6


def test_without_its_state_the_federation_differs(configure, hospital, begin, tmp_path):
    """The equality above is not trivial: it needs what the hospital keeps between rounds."""
    config = configure({**ADAMW, **DECAY, "federation.rounds": 3, "federation.local-steps": 4})
    training = begin(config)
    training.finish()
    alone = training.session.adapter.state()
    session = Worker().session(config)
    b = {key: np.zeros(shape, np.float32) for key, shape in session.adapter.shapes.items()}
    for number in (1, 2, 3):
        fresh = load_state(tmp_path / "empty", before_round=number)
        b = update(LocalRound(session, hospital, b, fresh, config, number)).b
    assert max(np.abs(b[key] - alone[key]).max() for key in b) > 1e-3
