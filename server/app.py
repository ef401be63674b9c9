"""Flower's ServerApp: read the configuration, run the rounds, write what came out."""

import contextlib
import time
from collections import Counter
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.choice import Choice
from common.config import Config
from common.configio import completed_for_flwr, from_flat
from common.errors import DiskFull, FedrxError
from common.model.adapter.layout import adapter_spec, initial_tensors
from common.privacy.budget.receipts import privacy_lines, privacy_summary
from common.privacy.settings import HOSPITAL, hospital_warning, plan_of, protects
from common.provenance import (
    environment,
    peak_rss_bytes,
    source_digest,
    tensors_sha256,
    tokens_per_second,
)
from common.records.run import Inputs, Layout, RunRecord
from common.records.summary import (
    AdapterFacts,
    BackboneFacts,
    HospitalFacts,
    KernelFacts,
    Summary,
    WireTotals,
)
from common.rundir import ENVIRONMENT, RUN, SUMMARY, TRAINED, RunDirectory
from common.wire.cohort import NOT_EVALUATED
from common.wire.contract import Fingerprints, Tensors
from common.wire.identity import read_keys
from server.checkpoints import ChangedRun
from server.clock import Clock
from server.known import known
from server.progress import note_end, note_start
from server.roster import Roster
from server.rounds import Rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation; the run directory tells how it ended."""
    config = completed_for_flwr(from_flat(context.run_config), run_id=context.run_id)
    run = run_directory(config)
    note_start(run)
    try:
        federate(grid, config, run)
    except ChangedRun:
        raise
    except BaseException as error:
        reason = str(error) if isinstance(error, FedrxError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError, DiskFull):  # then the error alone tells
            run.write_status("failed", error=reason)
        raise


def federate(grid: Grid, config: Config, run: RunDirectory, *, clock: Clock = time) -> None:
    """Shake hands, run the rounds, and write summary.json."""
    started = clock.monotonic()
    adapter = adapter_spec(config.adapter)
    layout, inputs = known(config, run)
    rounds = Rounds(
        grid=grid,
        config=config,
        run=run,
        shapes=layout.shapes,
        scheme=adapter.scheme,
        roster=Roster(
            ours=Fingerprints(a=inputs.a, backbone=layout.backbone, source=source_digest()),
            plan=plan_of(config) if protects(config) else None,
            clock=clock,
            keys=read_keys(Path(config.run.hospital_keys)) if config.run.hospital_keys else None,
        ),
        clock=clock,
    )
    b = rounds.start(initial_tensors(layout.shapes, adapter))
    run.write_config(rounds.config)
    seconds = round(clock.monotonic() - started, 3)
    summary = summarise(rounds.config, run, layout, inputs, rounds.roster, b, seconds)
    run.write_json(SUMMARY, summary)
    record = run.record()
    if record and record.mode == "flower":
        run.write_status("finished", round=config.federation.rounds)
        note_end(run)
    else:
        # The launcher goes on with the evaluation: a run killed there must not look finished.
        run.write_status("running", stage=TRAINED, round=config.federation.rounds)


def run_directory(config: Config) -> RunDirectory:
    """Open the run directory that the launcher made, or make one for plain ``flwr run``."""
    run = RunDirectory(Path(config.run.directory))
    if run.record() is None:
        run = RunDirectory.create(config, directory=run.path)
        run.write_json(ENVIRONMENT, {**environment([]), "mode": "flower"})
        run.write_json(RUN, RunRecord(mode="flower", resumable=False))
    return run


def summarise(
    config: Config,
    run: RunDirectory,
    layout: Layout,
    inputs: Inputs,
    roster: Roster,
    b: Tensors,
    seconds: float,
) -> Summary:
    """Return the server's part of summary.json."""
    handshakes = [roster.handshakes[name] for name in sorted(roster.handshakes)]
    first = handshakes[0]
    losses = {
        event.place: event.number
        for event in run.metrics("validation-loss")
        if event.hospital is None
    }
    losses |= {event.place: None for event in run.metrics(NOT_EVALUATED)}
    workers = run.workers()
    trained = sum(one.training_seconds for one in workers)
    peaks = [one.peak_device_bytes for one in workers if one.peak_device_bytes]
    summary = Summary(
        trainable_parameters=layout.trainable_parameters,
        adapter=AdapterFacts.model_validate(adapter_spec(config.adapter)),
        backbone=BackboneFacts(name=config.model.backbone, fingerprint=inputs.backbone),
        hospitals=tuple(
            HospitalFacts(name=one.hospital, patients=one.patients, samples=one.samples)
            for one in handshakes
        ),
        rounds=config.federation.rounds,
        b_sha256=tensors_sha256(b),
        wire=wire_totals(run),
        overhead_seconds_per_hospital_round=overhead_seconds(run, len(workers)),
        backbone_loads=sum(one.backbone_loads for one in workers),
        workers=len(workers),
        validation_loss=tuple(losses[index] for index in sorted(losses)),
        seconds=seconds,
        tokens_per_second=tokens_per_second(sum(one.tokens for one in workers), trained),
        peak_rss_bytes=peak_rss_bytes(),
        peak_device_bytes=max(peaks, default=None),
        device=first.device,
        attention=KernelFacts(kernel=first.attention, reason=first.attention_reason),
        dtype=Choice(first.dtype, first.dtype_reason),
    )
    if not roster.plan:
        return summary
    privacy = privacy_summary(roster.plan, privacy_lines(run))
    if roster.plan.unit == HOSPITAL:
        warning = hospital_warning(roster.plan, layout.trainable_parameters)
        privacy = privacy.model_copy(update={"warning": warning})
    return summary.having(privacy=privacy)


def overhead_seconds(run: RunDirectory, workers: int) -> float | None:
    """Return what a hospital's round costs beyond its local training, mean in seconds.

    Workers train side by side, so an exchange that cost nothing would take the hospitals' training
    seconds over the number of workers. None where hospitals tell no seconds (privacy).
    """
    trained, waited = run.numbers("seconds"), sum(run.numbers("train-exchange-seconds"))
    if not trained or not workers:
        return None
    return round((waited - sum(trained) / workers) / len(trained), 4)


def wire_totals(run: RunDirectory) -> WireTotals:
    """Add up wire.jsonl: tensor names, bytes in both directions."""
    tensors: set[str] = set()
    total: Counter[str] = Counter()
    for line in run.wire():
        tensors.update(line.tensors)
        total[line.direction] += line.bytes
    return WireTotals(
        tensors=tuple(sorted(tensors)), bytes_up=total["up"], bytes_down=total["down"]
    )
