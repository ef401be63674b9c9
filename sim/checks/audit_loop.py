"""The private path end to end, under watch: made-up patients through the code that a hospital runs.

Nothing is stood in for: ``client.private_update`` charges the ledger, draws, computes and clips the
patients' gradients, adds noise, steps the optimizer and writes the receipt, round after round.
"""

import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from client.local_update import LocalRound, update
from client.private_update import guard_of, private_update
from common.config import Config
from common.model.adapter.layout import initial_tensors
from common.model.session import Session
from common.privacy.accounting import epsilon
from common.privacy.audit import CONFIDENCE, Guesses, bound_of, lower_bound
from common.privacy.budget.guard import RECEIPT
from common.privacy.budget.receipts import Receipt
from common.privacy.canaries import (
    Coins,
    Floats,
    RoundSeen,
    area_with_deviation,
    clipped_rows,
    ideal_areas,
    likelihood_ratios,
)
from common.privacy.findings import FALSE_ALARM
from common.privacy.loop_checks import (
    draw_check,
    ledger_check,
    loop_noise_check,
    opened,
    pass_check,
    release_check,
)
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import grid_for
from common.privacy.plan import PrivacyPlan
from common.privacy.settings import plan_of
from common.privacy.watch import Watch, Watched
from common.records.checks import Finding
from common.seeds import stream
from common.text.batches import Encoded
from common.training.gradients import StepLoss
from common.training.hospital_data import HospitalData
from common.training.optimiser import TrainState

RUNS = 3
STEPS = 24
"""Most steps of an audited run; the claim is that of the steps that were run."""
CANARY_TOKENS = 4
IDEAL_RUNS = 120
PATIENTS_A_STEP = 8
CONTROL_SLACK = 0.05
"""How far below its reach the attack may stay without noise: B moves within a round."""


def loop_config(config: Config) -> Config:
    """Return the run that is audited: the configured one, or its plan over fewer steps.

    What is done with a release after it was made is no part of the mechanism and is left out:
    the proximal term and the cut of the step's norm.
    """
    federation, train = config.federation, replace(config.train, max_grad_norm=0.0)
    rounds = min(federation.rounds, 4)
    if plan_of(config).steps > STEPS or rounds < federation.rounds:
        train = replace(train, steps=0, epochs=0.0)
        federation = replace(federation, rounds=rounds, local_steps=STEPS // rounds)
    federation = replace(federation, strategy="fedavg")
    return replace(config, federation=federation, train=train)


def audit_loop(session: Session, config: Config, *, canaries: int) -> list[Finding]:
    """Run the loop under watch and return what was found.

    Three runs in which canaries are in or out by a coin bound epsilon from below (Steinke, Nasr,
    Jagielski 2023); two runs of one hospital with the same seeds everywhere, and one of an empty
    hospital, are taken apart release by release.

    Args:
        session: Open; its adapter is overwritten.
        config: With privacy on and its noise calibrated.
        canaries: Of each run that is attacked; at most half of B's entries are used.
    """
    config = loop_config(config)
    plan = plan_of(config)
    canaries = min(canaries, session.adapter.trainable_parameters // 2)
    trials = [_trial(session, config, canaries, number) for number in range(RUNS)]
    hospital = _hospital(session, plan)
    with _same_seeds():
        first = watch_run(session, config, hospital)
    with _same_seeds():
        second = watch_run(session, config, hospital)
    empty = watch_run(session, config, ())
    exact = [first, second, empty]
    steps = [step for run in exact for step in run.steps]
    openings = [opened(session, step, plan) for step in steps]
    runs = [*exact, *(trial.watched for trial in trials)]
    everything = [step for run in runs for step in run.steps]
    return [
        *_membership(trials, plan),
        release_check(openings, steps),
        loop_noise_check(openings, plan),
        draw_check(runs, (first, second), plan),
        pass_check(everything, session),
        ledger_check(runs, plan),
        sent_check(runs, session, config),
    ]


def sent_check(runs: Sequence[Watched], session: Session, config: Config) -> Finding:
    """Hold what is sent to what the releases alone make of B, with nobody's records at hand."""
    worst = 0.0
    for run in runs:
        nobody, state = HospitalData(name="audited", train=(), validation=()), TrainState()
        b = initial_tensors(session.adapter.shapes, session.adapter.spec)
        for number, sent in enumerate(run.sent, 1):
            task = LocalRound(session, nobody, b, state, config, number)
            b = update(task, Replayed(run)).b
            # what is no number is no release's, and fails every comparison
            away = float(np.max([np.abs(b[key] - sent[key]).max() for key in b]))
            worst = max(worst, away if away >= 0 else math.inf)
            b = sent
    return Finding(
        audit="what is sent",
        figure=worst,
        meaning=f"largest difference of {sum(len(run.sent) for run in runs)} sent B from what the "
        "rounds' releases alone make of the B before",
        null=0.0,
        limit=0.0,
        passed=worst == 0,
        verdict="follows from the releases" if worst == 0 else "more than the releases",
    )


class Replayed:
    """A run's releases, step by step: a gradient source without any patient."""

    def __init__(self, run: Watched) -> None:
        self.run = run

    def __call__(self, session: Session, step: int) -> StepLoss:
        """Hand out one step's release again."""
        session.adapter.flat_grad.copy_(self.run.steps[step].release_P)
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)


def watch_run(session: Session, config: Config, records: tuple[Encoded, ...]) -> Watched:
    """Train one made-up hospital alone, all rounds of the run, under watch."""
    watch = Watch(session, records)
    hospital = HospitalData(name="audited", train=records, validation=())
    adapter, state = session.adapter, TrainState()
    b = initial_tensors(adapter.shapes, adapter.spec)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, config.federation.rounds + 1):
            guard = watch.over(guard_of(config, hospital, Path(folder)))
            adapter.load(b)
            watch.starts()
            task = LocalRound(watch.session, hospital, b, state, config, number, watch.on_step)
            b = private_update(task, Path(folder), guard=guard).b
            watch.run.sent.append(b)
        watch.run.receipt = Receipt.read((Path(folder) / RECEIPT).read_bytes(), what=RECEIPT)
    return watch.run


class _Trial:
    """One attacked run: who was in, and what the releases say about it."""

    def __init__(self, watched: Watched, taking_part: Coins, rounds: list[RoundSeen]) -> None:
        self.watched, self.taking_part, self.rounds = watched, taking_part, rounds

    @property
    def reach(self) -> float:
        """The area of an attack that tells everyone who was drawn at least once."""
        drawn = set().union(*(step.entered for step in self.watched.steps))
        return 1 - (1 - len(drawn) / max(1, int(self.taking_part.sum()))) / 2

    def areas(self, ratios_M: Floats) -> tuple[float, float]:
        return area_with_deviation(ratios_M[self.taking_part], ratios_M[~self.taking_part])


def _trial(session: Session, config: Config, canaries: int, number: int) -> _Trial:
    plan = plan_of(config)
    records = made_up(session, [CANARY_TOKENS] * canaries, range(canaries), number)
    taking_part = NoiseSource().bernoulli(canaries, 0.5)
    inside = tuple(records[place] for place in np.flatnonzero(taking_part))
    watched = watch_run(session, config, inside)
    rounds, local = [], len(watched.steps) // config.federation.rounds
    for start in range(0, len(watched.steps), local):
        steps = watched.steps[start : start + local]
        session.adapter.flat.copy_(steps[0].before_P)
        rows_MP = clipped_rows(session, list(records), plan)
        released_SP = torch.stack([step.release_P for step in steps])
        noise_step = grid_for(plan, released_SP.shape[1]).step
        noise_SP = torch.zeros_like(released_SP)
        for row_P, step in zip(noise_SP, steps, strict=True):
            for drawn in step.noise:
                row_P += torch.from_numpy(drawn).double() * noise_step
        scale = plan.expected_batch / plan.clip_norm
        noisy_SM, bare_SM = (
            (scale * seen_SP.float() @ rows_MP.T).double().numpy()
            for seen_SP in (released_SP, released_SP - noise_SP)
        )
        gram_MM = (rows_MP @ rows_MP.T).double().numpy()
        rounds.append(RoundSeen(gram_MM=gram_MM, releases_SM=noisy_SM, bare_SM=bare_SM))
    return _Trial(watched, taking_part, rounds)


def _membership(trials: Sequence[_Trial], plan: PrivacyPlan) -> list[Finding]:
    from scipy.stats import t

    ratios = [likelihood_ratios(trial.rounds, plan) for trial in trials]
    bounds = [
        bound_of(ratio, trial.taking_part, plan.delta)
        for ratio, trial in zip(ratios, trials, strict=True)
    ]
    areas = [trial.areas(ratio) for ratio, trial in zip(ratios, trials, strict=True)]
    area = float(np.mean([value for value, _ in areas]))
    deviation = float(np.sqrt(np.sum([d**2 for _, d in areas]))) / len(areas)
    ideal = ideal_areas(trials[0].rounds, plan, stream(0, "audit-ideal"), runs=IDEAL_RUNS)
    spread = float(ideal.std(ddof=1)) * (1 / len(trials) + 1 / len(ideal)) ** 0.5
    limit = float(ideal.mean()) + float(t.isf(FALSE_ALARM, len(ideal) - 1)) * spread
    bare = [trial.areas(likelihood_ratios(trial.rounds, plan, bare=True)) for trial in trials]
    count, claim = len(trials[0].taking_part), epsilon(plan).value
    ceiling = lower_bound(Guesses(count, count, count), plan.delta, confidence=1 - 0.046 / 3)
    refuted, has_power = min(bounds) > claim, claim <= ceiling
    verdict = "the claim is refuted" if refuted else "consistent with the claim"
    if not refuted and not has_power:
        verdict += f"; {count} canaries could not refute a claim above {ceiling:.2f}"
    more = area > limit
    # who was in and never drawn cannot be told from those who were out
    reach = float(np.mean([trial.reach for trial in trials]))
    works = float(np.mean([value for value, _ in bare])) > reach - CONTROL_SLACK
    return [
        Finding(
            audit="one-run audit of the loop",
            figure=min(bounds),
            meaning=f"lower bound on epsilon of {plan.steps} steps through the whole loop, "
            f"{count} canary patients in or out by a coin, least of {len(trials)} runs at "
            f"{CONFIDENCE:.1%} each",
            null=0.0,
            interval=(min(bounds), float("inf")),
            limit=claim,
            false_alarm=(1 - CONFIDENCE) ** len(trials),
            has_power=has_power,
            passed=not refuted,
            verdict=verdict,
        ),
        Finding(
            audit="membership in the loop",
            figure=area,
            meaning="area under the ROC curve of in against out, mean of the runs; the null is "
            "that of the claimed mechanism, simulated with the same gradients (0.5 is chance)",
            null=float(ideal.mean()),
            interval=(area - 1.96 * deviation, area + 1.96 * deviation),
            limit=limit,
            false_alarm=FALSE_ALARM,
            passed=not more,
            verdict="more than the claimed mechanism discloses" if more else "as claimed",
        ),
        Finding(
            audit="membership in the loop, control without noise",
            figure=float(np.mean([value for value, _ in bare])),
            meaning="the same attack on the same releases with the noise taken out; the null is "
            "reached by telling everyone who was drawn at least once",
            null=reach,
            limit=reach - CONTROL_SLACK,
            passed=works,
            verdict="the attack works" if works else "the attack has no power here",
        ),
    ]


def _hospital(session: Session, plan: PrivacyPlan) -> tuple[Encoded, ...]:
    """Make patients up: of one to three records, unless the record is the unit."""
    patients = int(np.clip(np.ceil(PATIENTS_A_STEP / plan.sampling_rate), 16, 200))
    counts = [1 if plan.unit == "admission" else 1 + place % 3 for place in range(patients)]
    units = [unit for unit, count in enumerate(counts) for _ in range(count)]
    lengths = [4 + place % 6 for place in range(len(units))]
    return made_up(session, lengths, units, RUNS)


def made_up(
    session: Session, lengths: Sequence[int], units: Sequence[int], number: int
) -> tuple[Encoded, ...]:
    """Make records of random tokens with one or two labels each."""
    generator = stream(0, "audit-canaries", number)
    vocabulary = int(session.model.config.vocab_size)
    return tuple(
        Encoded(
            input_ids=tuple(generator.integers(2, vocabulary, length).tolist()),
            answer_start=length - 1 - (length > 6),
            unit=unit,
        )
        for length, unit in zip(lengths, units, strict=True)
    )


@contextmanager
def _same_seeds() -> Iterator[None]:
    """Start every global generator from the same state, and put back what was there."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
