"""A deployed hospital's own limit on what all runs together may spend on its patients."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from client.policy import Policy
from common.config import Config
from common.configio import config_digest, run_digest
from common.errors import RunFailed
from common.files import json_line, locked
from common.privacy.accounting import epsilon, rdp_epsilon
from common.privacy.budget.ledger import Ledger
from common.privacy.budget.synced import append, read
from common.privacy.settings import is_private, plan_of
from common.records import Record
from common.training.budget import steps_in_all

PROMISES = "privacy-promises.jsonl"
"""One line per run that was joined; only ever appended to."""
LARGEST_DELTA, LEAST_DELTA = 1e-5, 1e-10
"""Below the least one rounding errors decide what the accountants find."""
HOPELESS = 2.0
"""A run whose Renyi bound is so many times the limit is refused without exact accounting, which
takes up to a minute there: the bound is a fifth too high, not twofold."""
SLACK = 1 + 1e-9
"""Of sums of decimal fractions."""


class LimitReached(RunFailed):
    """The hospital takes no part in this run. The text holds public constants alone."""


class Promise(Record):
    """What one run may spend on each patient of this hospital."""

    run: str
    """Digest of its whole configuration and place (``common.configio.run_digest``)."""
    plan: str
    epsilon: float
    delta: float


def keep_to_limit(
    sent: Config, policy: Policy, folder: Path, *, ledger: Path, patients: Callable[[], int]
) -> None:
    """Record what a run may spend on this hospital's patients, or refuse to take part in it.

    Runs on the same patients compose: their epsilons add up, and so do their deltas (Dwork and
    Roth 2014, theorem 3.16). A run counts with its whole plan from its first message on, for all
    the hospital knows of how far the server gets, and what it was promised is never taken back.
    Everything that is cheap is checked before anything that is not.

    The run's ledger is opened before its promise is written. One that is gone would begin anew and
    spend the promise again, so a promise without a ledger is refused.

    ``patients`` is called only where the limit depends on their number.

    Raises:
        LimitReached: if the policy does not allow the run, or its ledger is gone.
    """
    _check_bounds(sent, policy)
    if policy.max_epsilon is None:
        return
    largest_delta = policy.max_delta or default_delta(patients())
    _check_private(sent, policy, largest_delta)
    plan = plan_of(sent)
    asked = Promise(
        run=run_digest(sent),
        plan=plan.fingerprint,
        epsilon=epsilon(plan).value,
        delta=plan.delta,
    )
    with _promises(folder / PROMISES) as (known, write):
        before = known.get(asked.run)
        if before is not None and before.plan != asked.plan:
            raise LimitReached("this run was promised its cost under another privacy plan")
        others = [one for one in known.values() if one.run != asked.run]
        _check_sum(others, asked, policy.max_epsilon, largest_delta)
        if before is None:
            Ledger(ledger, plan)
            write(asked)
        elif not ledger.is_file() or not ledger.stat().st_size:
            raise LimitReached(
                "this run's ledger is gone from the hospital's folder, so what it has spent is "
                "unknown: nothing is released"
            )


def default_delta(patients: int) -> float:
    """Return the most that all runs' deltas may add up to where the policy names no figure.

    At most 1e-5, and less than 1 / (10 x patients). A server that tries deltas learns the bound,
    so it tells no more of the number of patients than its power of ten.

    >>> default_delta(100), default_delta(10_000), default_delta(10_001)
    (1e-05, 1e-05, 1e-06)
    """
    return min(LARGEST_DELTA, 10.0 ** -(1 + math.ceil(math.log10(max(patients, 1)))))


def _check_bounds(sent: Config, policy: Policy) -> None:
    """Hold a run to what this hospital's machine is there for, private or not."""
    if policy.allowed_configurations and config_digest(sent) not in policy.allowed_configurations:
        raise LimitReached(
            f"configuration {config_digest(sent)} is none that this hospital has agreed to"
        )
    train, federation = sent.train, sent.federation
    steps = train.steps or math.ceil(train.epochs) or federation.rounds * federation.local_steps
    scale = sent.adapter.alpha / sent.adapter.rank
    bounds = [
        ("federation.rounds", federation.rounds, policy.max_rounds),
        ("optimizer steps", steps, policy.max_steps),
        ("train.learning-rate", train.learning_rate, policy.max_learning_rate),
        ("adapter.alpha / adapter.rank", scale, policy.max_scale),
    ]
    for name, value, most in bounds:
        if value > most:
            raise LimitReached(f"{name} = {value:g}; this hospital allows at most {most:g}")


def keep_to_steps(sent: Config, policy: Policy, train_samples: int) -> None:
    """Hold a run that counts in epochs to ``max-steps``: how many steps follows from the samples.

    A private step does not depend on the samples; their number is 0 then.

    Raises:
        LimitReached: if the run takes more steps; the text tells no count of this hospital.
    """
    if steps_in_all(sent, train_samples).value > policy.max_steps:
        raise LimitReached(
            f"train.epochs = {sent.train.epochs:g} takes more optimizer steps here than this "
            f"hospital allows ({policy.max_steps:g})"
        )


def _check_private(sent: Config, policy: Policy, largest_delta: float) -> None:
    """Refuse what is not private by its own plan, by public constants alone."""
    privacy = sent.privacy
    if not is_private(sent) or privacy.unit != "patient" or privacy.deterministic_noise:
        raise LimitReached(
            "this hospital takes part only in runs that protect every patient (max-epsilon is set "
            "in its policy); fix: set privacy.target-epsilon, privacy.unit = patient and no "
            "deterministic noise"
        )
    bounds = [
        ("noise-multiplier", privacy.noise_multiplier, policy.min_noise_multiplier, math.inf),
        ("expected-batch", privacy.expected_batch, policy.min_expected_batch, math.inf),
        ("delta", privacy.delta, LEAST_DELTA, largest_delta),
    ]
    for name, value, least, most in bounds:
        if not least <= value <= most:
            calibrated = name == "noise-multiplier" and value == 0
            raise LimitReached(
                f"privacy.{name} = {value:g}; this hospital allows "
                + (f"{least:g} to {most:g}" if math.isfinite(most) else f"{least:g} and more")
                + ("; fix: state the calibrated multiplier in the run's configuration" * calibrated)
            )
    assert policy.max_epsilon is not None
    steps = sent.train.steps or sent.federation.rounds * sent.federation.local_steps
    rough = rdp_epsilon(privacy.noise_multiplier, privacy.sampling_rate, steps, privacy.delta)
    if rough > HOPELESS * policy.max_epsilon:
        raise LimitReached(
            f"this hospital's limit is epsilon {policy.max_epsilon:g} over all runs: this one may "
            f"spend {rough:.4g} by Renyi's bound"
        )


def _check_sum(
    others: list[Promise], asked: Promise, max_epsilon: float, largest_delta: float
) -> None:
    sums = [
        ("epsilon", [one.epsilon for one in others], asked.epsilon, max_epsilon),
        ("delta", [one.delta for one in others], asked.delta, largest_delta),
    ]
    for name, spent, wanted, limit in sums:
        if not math.fsum([*spent, wanted]) <= limit * SLACK:
            raise LimitReached(
                f"this hospital's limit is {name} {limit:g} over all runs: {math.fsum(spent):.4g} "
                f"is promised to {len(others)} others, and this one may spend {wanted:.4g}"
            )


@contextmanager
def _promises(
    file: Path,
) -> Iterator[tuple[dict[str, Promise], Callable[[Promise], None]]]:
    """Hold the promises' file; yield what it says, by run, and how to add a line, synced."""
    with locked(file) as handle:
        text = read(handle)
        # A last line without its end was torn by a crash, and nothing was released for it.
        whole = text[: text.rfind("\n") + 1]
        known = {one.run: one for one in map(_promise, whole.splitlines())}

        def write(one: Promise) -> None:
            os.ftruncate(handle, len(whole.encode()))
            append(handle, json_line(one.as_json()), file, LimitReached, PROMISES)

        yield known, write


def _promise(line: str) -> Promise:
    try:
        return Promise.model_validate_json(line)
    except ValidationError:
        raise LimitReached(
            f"{PROMISES} is damaged: what earlier runs cost is unknown, and nothing is released"
        ) from None
