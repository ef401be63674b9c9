"""``fedrx forget``: a run replayed without one hospital, beside a run that never had it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.config import Config, RunConfig
from common.data.partition import Hospital
from common.errors import UserError
from common.model.session import Session
from common.privacy.canaries import area_with_deviation
from common.privacy.membership import patient_losses, ratios
from common.privacy.settings import protects
from common.provenance import tensors_sha256
from common.records import Record
from common.rundir import RunDirectory
from common.tensor_files import Tensors, write_tensors
from common.training.worker import Worker
from server.replay import Replay
from server.screening import distance
from sim.answers.evaluate import reopen
from sim.answers.held_out import HeldOut
from sim.checks.audit_membership import FEWEST, MEMBERSHIP, split_records
from sim.process.lock import exclusive
from sim.process.progress import SILENT, Console
from sim.runs.cells import Cell, run_cell

FORGET, B_FILE = "forget.json", "b.safetensors"
RUN, REPLAYED, NEVER = "the run", "replayed without it", "a run that never had it"


class ForgottenModel(Record):
    """One model beside the others."""

    b_sha256: str
    distance: float
    """L2 norm of its B less that of the run that never had the hospital."""
    loss_of_hospital: float | None
    """Nats per answer token, mean over the forgotten hospital's held-out patients."""
    loss_of_others: float | None
    membership: tuple[float, float, float] | None
    """Area under the ROC curve by which the hospital's patients trained on are told from those it
    held out, with its interval; where the run's audit has such a figure, and patients suffice."""


class ForgetRecord(Record):
    """forget.json: a run without one hospital."""

    hospital: str
    models: dict[str, ForgottenModel]
    seconds: float


def forget(
    run: RunDirectory, hospital: str, *, console: Console = SILENT, command_line: Sequence[str]
) -> ForgetRecord:
    """Replay a run's rounds without a hospital, and compare with a run that never had it.

    Writes b.safetensors (the replayed B) and forget.json below ``without-HOSPITAL`` of the run;
    ``never`` there is the other run, which is trained unless it is finished.

    Args:
        run: A finished run with kept updates.
        hospital: Who leaves.
        console: Where progress is shown.
        command_line: Stored with the other run.

    Raises:
        UserError: if nobody of that name took part, or nobody else did; see ``Replay.open``.
    """
    started = time.monotonic()
    with exclusive(run):
        replay, b, config = Replay.read(run), run.load_checkpoint().b, run.config()
        others = [name for name in replay.hospitals if name != hospital]
        if len(others) == len(replay.hospitals) or not others:
            raise UserError(
                f"--hospital {hospital}: "
                + ("nobody else took part" if not others else "no hospital of the run"),
                allowed=", ".join(replay.hospitals) if others else "runs of two hospitals or more",
                fix="name another hospital" if others else "name another run",
            )
        replay.require_b_of(run)
        folder = folder_without(run, hospital)
        folder.mkdir(exist_ok=True)
        if protects(config):
            line = "the run that never had it spends as much epsilon on the others' patients again"
            console.say(line, style="yellow")
        run_cell(without(config, hospital, others), folder / "never", console, command_line)
        never = RunDirectory.open(folder / "never").load_checkpoint().b
        models = {
            RUN: b,
            REPLAYED: replay.of(others),
            NEVER: never,
        }
        data, session = reopen(run, config, Worker())
        held_out = HeldOut.of(data.hospitals, session, config)
        losses_MN = held_out.losses(session, models.values())
        own_N = np.array([name == hospital for name in held_out.hospitals])
        areas: Mapping[str, tuple[float, float, float] | None] = dict.fromkeys(models)
        if (run.path / MEMBERSHIP).exists():
            (left,) = (one for one in data.hospitals if one.name == hospital)
            areas = _areas(left, session, config, models, replay.rounds[0][0])
        result = ForgetRecord(
            hospital=hospital,
            models={
                name: ForgottenModel(
                    b_sha256=tensors_sha256(b),
                    distance=distance(b, never),
                    loss_of_hospital=_mean(row_N[own_N]),
                    loss_of_others=_mean(row_N[~own_N]),
                    membership=areas[name],
                )
                for (name, b), row_N in zip(models.items(), losses_MN, strict=True)
            },
            seconds=round(time.monotonic() - started, 3),
        )
        write_tensors(folder / B_FILE, models[REPLAYED])
        RunDirectory(folder).write_json(FORGET, result)
    return result


def folder_without(run: RunDirectory, hospital: str) -> Path:
    """Return where a run's replay without a hospital lies."""
    return run.path / f"without-{hospital}"


def without(config: Config, hospital: str, others: Sequence[str]) -> Cell:
    """Return the run that never had a hospital; all else is as it was, the patients' places too."""
    alone = replace(config.federation, only=",".join(others))
    settings = RunConfig(name=f"without-{hospital}", backend=config.run.backend)
    return Cell(
        arm="never",
        seed=config.train.seed,
        part=hospital,
        config=replace(config, federation=alone, run=settings),
        federated=True,
    )


def _areas(
    hospital: Hospital,
    session: Session,
    config: Config,
    models: Mapping[str, Tensors],
    untrained: Tensors,
) -> dict[str, tuple[float, float, float] | None]:
    inside, outside = split_records([hospital], session, config)
    found: dict[str, tuple[float, float, float] | None] = {}
    for name, b in models.items():
        members, others = (
            ratios(patient_losses(session, records, [b, untrained])[0]) if records else np.zeros(0)
            for records in (inside, outside)
        )
        found[name] = None
        if min(len(members), len(others)) >= FEWEST:
            area, deviation = area_with_deviation(members, others)
            found[name] = (area, area - 1.96 * deviation, area + 1.96 * deviation)
    return found


def _mean(losses: NDArray[np.float64]) -> float | None:
    return float(losses.mean()) if len(losses) else None
