"""How many steps a run takes, and why: one rule for hospitals and the single-node mode."""

import math

from common.config import Config
from common.model.choice import Choice


def steps_in_all(config: Config, train_samples: int) -> Choice[int]:
    """Return the optimizer steps of a whole run on ``train_samples`` samples.

    ``train.steps`` decides, else ``train.epochs``, else rounds times local steps.

    >>> steps_in_all(Config(), 100).value
    40
    """
    train, federation = config.train, config.federation
    if train.steps:
        return Choice(train.steps, "train.steps")
    if train.epochs:
        per_epoch = math.ceil(train_samples / (train.batch_size * train.accumulation))
        steps = max(1, round(train.epochs * per_epoch))
        return Choice(steps, f"train.epochs = {train.epochs:g} of {per_epoch} steps")
    local = federation.local_steps or 1
    return Choice(federation.rounds * local, "federation.rounds x federation.local-steps")


def steps_of_round(config: Config, train_samples: int, server_round: int) -> Choice[int]:
    """Return a hospital's optimizer steps in one round (rounds count from 1).

    With ``federation.local-steps = 0`` the whole run's steps are dealt evenly to the rounds.

    >>> steps_of_round(Config(), 100, 1).value
    10
    """
    federation = config.federation
    if federation.local_steps:
        return Choice(federation.local_steps, "federation.local-steps")
    total = steps_in_all(config, train_samples)
    before = total.value * (server_round - 1) // federation.rounds
    after = total.value * server_round // federation.rounds
    return Choice(after - before, f"{total.reason}, dealt to {federation.rounds} rounds")


def schedule_steps(config: Config, train_samples: int) -> int:
    """Return the steps that a decaying learning rate is spread over in federated training."""
    if config.federation.local_steps:
        return config.federation.rounds * config.federation.local_steps
    return steps_in_all(config, train_samples).value
