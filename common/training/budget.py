"""How many steps a run takes, and why: one rule for hospitals and the single-node mode."""

import math
from collections.abc import Iterator

from common.choice import Choice
from common.config import Config
from common.errors import SettingError, UserError
from common.model.adapter.scheme import Scheme


def steps_in_all(config: Config, train_samples: int) -> Choice[int]:
    """Return the optimizer steps that one hospital (or the single node) takes in the whole run.

    ``train.steps`` decides, else ``train.epochs``, else rounds times local steps. A learning rate
    that decays is spread over these steps.

    Raises:
        UserError: if none of them is set.

    >>> steps_in_all(Config(), 100).value
    40
    """
    train, federation = config.train, config.federation
    if train.steps:
        return Choice(train.steps, "train.steps")
    if train.epochs:
        per_epoch = steps_per_epoch(config, train_samples)
        steps = max(1, round(train.epochs * per_epoch))
        return Choice(steps, f"train.epochs = {train.epochs:g} of {per_epoch} steps")
    if not federation.local_steps:
        raise SettingError(
            "federation.local-steps=0 with neither train.steps nor train.epochs",
            fix="set one of the three",
        )
    return Choice(
        federation.rounds * federation.local_steps, "federation.rounds x federation.local-steps"
    )


def steps_of_round(config: Config, train_samples: int, server_round: int) -> Choice[int]:
    """Return a hospital's optimizer steps in one round (rounds count from 1).

    The steps of the whole run are dealt evenly to the rounds, so that the rounds of a run with
    one hospital take the steps of the single-node run, whichever key decides.

    Raises:
        UserError: if there are fewer steps than rounds.

    >>> steps_of_round(Config(), 100, 1).value
    10
    """
    rounds = config.federation.rounds
    total = steps_in_all(config, train_samples)
    if total.value < rounds:
        raise UserError(
            f"{total.value} steps ({total.reason}) for federation.rounds={rounds}",
            allowed="at least one step a round",
            fix="lower federation.rounds, or take more steps",
        )
    before = total.value * (server_round - 1) // rounds
    after = total.value * server_round // rounds
    return Choice(after - before, f"{total.reason}, dealt to {rounds} rounds")


def stretches(
    config: Config, scheme: Scheme, train_samples: int, *, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Cut the steps from ``start`` to ``stop`` where what is trained changes.

    Yields:
        The round, and the step before which the stretch ends.
    """
    if not scheme.block(1):
        yield 1, stop
        return
    for server_round in range(1, config.federation.rounds + 1):
        ends = min(stop, steps_before_round(config, train_samples, server_round + 1))
        if start < ends:
            yield server_round, ends
            start = ends


def steps_per_epoch(config: Config, train_samples: int) -> int:
    """Return the optimizer steps that see every training sample once."""
    return math.ceil(train_samples / (config.train.batch_size * config.train.accumulation))


def checkpoint_steps(config: Config, total: int) -> Choice[tuple[int, ...]]:
    """Return the steps after which a checkpoint is kept: those asked for, and the last.

    Steps beyond the end of the run are not lost: all are scaled so that the last one falls on the
    run's last step. So the paper's checkpoints keep their places in a shorter run.

    Raises:
        UserError: if ``train.checkpoint-steps`` is not a list of steps.

    >>> from dataclasses import replace
    >>> config = replace(Config(), train=replace(Config().train, checkpoint_steps="2,3,5"))
    >>> checkpoint_steps(config, 8).value, checkpoint_steps(config, 50).value
    ((2, 3, 5, 8), (2, 3, 5, 50))
    >>> checkpoint_steps(config, 4)
    Choice(value=(2, 4), reason='train.checkpoint-steps 2, 3, 5 scaled by 4/5')
    """
    text = config.train.checkpoint_steps
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise SettingError(
            f"train.checkpoint-steps={text!r}",
            allowed="steps from 1, comma-separated",
            fix='for instance train.checkpoint-steps="1950,2925,3900,4875"',
        )
    asked = sorted({int(part) for part in parts})
    if not asked:
        return Choice((total,), "the last step")
    longest = asked[-1]
    if longest <= total:
        return Choice(tuple(sorted({*asked, total})), "train.checkpoint-steps, and the last step")
    scaled = sorted({max(1, round(step * total / longest)) for step in asked})
    listed = ", ".join(map(str, asked))
    return Choice(tuple(scaled), f"train.checkpoint-steps {listed} scaled by {total}/{longest}")


def steps_before_round(config: Config, train_samples: int, server_round: int) -> int:
    """Return the optimizer steps of the rounds before ``server_round``, if asked in each.

    >>> steps_before_round(Config(), 100, 3)
    20
    """
    steps_of_round(config, train_samples, 1)  # raises if the rounds have no steps each
    total = steps_in_all(config, train_samples).value
    return total * (server_round - 1) // config.federation.rounds
