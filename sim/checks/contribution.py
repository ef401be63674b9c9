"""``fedrx contribution``: what each hospital adds to a run's model, as exact Shapley values."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.data.dataset import Dataset
from common.data.handling import handling_of
from common.errors import UserError
from common.evaluation.answers import evaluate_answers
from common.evaluation.metrics import drug_map_of, f1_by_admission, interval_of_mean
from common.evaluation.shapley import MOST_PLAYERS, members, shapley
from common.model.session import Session
from common.records import Record
from common.rundir import RunDirectory
from common.tensor_files import Tensors
from common.training.worker import Worker
from server.replay import Replay
from sim.answers.evaluate import reopen
from sim.answers.held_out import HeldOut
from sim.process.lock import exclusive
from sim.process.progress import SILENT, Console, Meter
from sim.report.html import Block, write_page
from sim.report.words import NOTICE

CONTRIBUTION, PAGE = "contribution.json", "contribution.html"
METRICS = {
    "loss": "nats per answer token by which the loss on held-out patients is lower",
    "f1": "F1 of the lists for held-out admissions",
}
Values = tuple[NDArray[np.float64], list[int]]
"""[S, N] values of the models, the higher the better, and the patient of each of N."""


class Contribution(Record):
    """What one hospital adds; the interval is by patient."""

    name: str
    value: float
    low: float | None
    high: float | None


class ContributionRecord(Record):
    """contribution.json: exact Shapley values of a run's hospitals."""

    metric: str
    meaning: str
    hospitals: tuple[Contribution, ...]
    nobody: float
    """Value of the model before any round; that of a loss is its negative."""
    everybody: float
    subsets: dict[str, float]
    """Value of every subset's model, by its hospitals."""
    patients: int
    seconds: float


def contribution(
    run: RunDirectory, *, console: Console = SILENT, metric: str = "loss"
) -> ContributionRecord:
    """Value every subset of a run's hospitals by the model that the rounds make of it.

    Writes contribution.json and contribution.html; both hold figures of all patients together.

    Args:
        run: A finished run with kept updates.
        console: Where progress is shown.
        metric: What a model is worth on held-out patients of all hospitals: ``loss`` or ``f1``.

    Raises:
        UserError: for another metric, more hospitals than ``MOST_PLAYERS``, a run without updates,
            or data that is not the run's.
    """
    started = time.monotonic()
    if metric not in METRICS:
        raise UserError(f"--metric {metric}", allowed=" | ".join(METRICS), fix="name one of these")
    with exclusive(run):
        replay = Replay.open(run)
        names = tuple(replay.hospitals)
        if len(names) > MOST_PLAYERS:
            raise UserError(
                f"{run.path} has {len(names)} hospitals, and {2 ** len(names)} subsets of them",
                allowed=f"at most {MOST_PLAYERS} hospitals",
                fix="train a run with fewer",
            )
        config = run.config()
        data, session = reopen(run, config, Worker())
        subsets = {s: members(s, names) for s in range(2 ** len(names))}
        with Meter(console, "models", len(subsets)) as meter:
            models = {place: replay.of(some) for place, some in subsets.items()}
            values_SN, patients = _values(metric, config, data, session, models, meter.update)
        settings = config.evaluation
        shares = [
            interval_of_mean(row, patients, resamples=settings.bootstrap, seed=settings.seed)
            for row in shapley(values_SN).tolist()
        ]
        means = values_SN.mean(1).tolist()
        result = ContributionRecord(
            metric=metric,
            meaning=METRICS[metric],
            hospitals=tuple(
                Contribution(name=name, **share._asdict())
                for name, share in zip(names, shares, strict=True)
            ),
            nobody=means[0],
            everybody=means[-1],
            subsets={", ".join(some) or "–": means[place] for place, some in subsets.items()},
            patients=len(set(patients)),
            seconds=round(time.monotonic() - started, 3),
        )
        run.write_json(CONTRIBUTION, result)
        write_page(run.path / PAGE, "FedRx: contributions", _blocks(result, data.source))
    return result


def _values(
    metric: str,
    config: Config,
    data: Dataset,
    session: Session,
    models: dict[int, Tensors],
    progress: Callable[[int], None],
) -> Values:
    if metric == "loss":
        losses_SN = HeldOut.of(data.hospitals, session, config).losses(
            session, models.values(), progress
        )
        return -losses_SN, list(range(losses_SN.shape[1]))
    named = {f"subset-{place}": b for place, b in models.items()}
    order = list(named)
    found = evaluate_answers(
        session,
        data.hospitals,
        config,
        named,
        progress=lambda model, done, of: progress(order.index(model) + (done == of)),
    )
    rows = {name: [row for row in found.predictions if row.model == name] for name in named}
    level, drug_map = config.data.normalisation, drug_map_of(config.data)
    f1 = [f1_by_admission(rows[name], level=level, drug_map=drug_map) for name in named]
    return np.array(f1), [row.cluster for row in rows[order[0]]]


def _note(result: ContributionRecord) -> str:
    return (
        f"Exact Shapley values: {result.meaning}. They add up to what all hospitals together add "
        f"to the untrained backbone, {result.everybody - result.nobody:+.4f}. Each subset's model "
        "is the run's rounds replayed with its updates alone, without training. Intervals: "
        f"bootstrap over {result.patients} held-out patients of all hospitals; those of retraining "
        "are not in them."
    )


def shares_block(result: ContributionRecord) -> Block:
    """Return what each hospital adds, as a table."""
    rows = tuple(
        (
            one.name,
            f"{one.value:+.4f}",
            "–" if one.low is None or one.high is None else f"{one.low:+.4f} to {one.high:+.4f}",
        )
        for one in result.hospitals
    )
    headers = ("hospital", f"adds ({result.metric})", "95% interval")
    title = "What each hospital adds"
    return Block(title=title, note=_note(result), headers=headers, rows=rows)


def _blocks(result: ContributionRecord, source: str) -> list[Block]:
    subsets = tuple((name, f"{value:.4f}") for name, value in result.subsets.items())
    return [
        Block(note=f"{NOTICE} {handling_of(source).report}", warning=True),
        shares_block(result),
        Block(title="Every subset", headers=("hospitals", "value"), rows=subsets),
    ]
