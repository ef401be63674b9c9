"""``fedrx audit RUN --membership``: can a run's patients be told from others by its model alone?"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from common.config import Config
from common.data.partition import Hospital
from common.errors import UserError
from common.model.adapter.layout import initial_tensors
from common.model.session import Session
from common.privacy.membership import membership_findings, patient_losses, ratios
from common.records.checks import MembershipRecord
from common.rundir import RunDirectory
from common.tensor_files import Tensors
from common.text.batches import Encoded
from common.training.worker import Worker
from common.wire.cohort import trained_by
from sim.answers.evaluate import reopen
from sim.answers.held_out import encoded
from sim.checks.audit import show
from sim.checks.audit_page import claim_of, write_audit_page
from sim.process.lock import exclusive
from sim.process.progress import SILENT, Console

MEMBERSHIP = "membership.json"
FEWEST = 10
"""Patients on either side below which nothing is said."""


def audit_membership(
    run: RunDirectory, *, console: Console = SILENT, references: Sequence[Path] = ()
) -> MembershipRecord:
    """Attack a finished run: patients it was trained on against those it held out.

    Patients are dealt to training and held-out splits by a hash of their own, so that neither side
    differs from the other but by training. Writes membership.json and the page; both hold figures
    of the whole only.

    Args:
        run: A finished run, private or not.
        console: Where findings are shown.
        references: Finished runs of the same backbone and A on other patients (another hospital's
            local-only run, say): their adapters are reference models beside the untrained one.

    Raises:
        UserError: if the run has not finished, too few patients are on one side, data or backbone
            are not those of the run, or a reference has another A.
    """
    started = time.monotonic()
    state = run.status().state
    if state != "finished":
        raise UserError(f"{run.path} is {state}", allowed="a finished run", fix="`fedrx resume` it")
    config = run.config()
    with exclusive(run):
        b = run.load_checkpoint().b
        data, session = reopen(run, config, Worker())
        adapter = session.adapter
        models: list[Tensors] = [
            b,
            initial_tensors(adapter.shapes, adapter.spec),
            *(_reference(path, session) for path in references),
        ]
        only = trained_by(config.federation)
        trained = [one for one in data.hospitals if not only or one.name in only]
        inside, outside = split_records(trained, session, config)
        members, _ = patient_losses(session, inside, models)
        outsiders, _ = patient_losses(session, outside, models)
        for count, what in ((len(members), "trained on"), (len(outsiders), "held out")):
            if count < FEWEST:
                raise UserError(
                    f"{count} patients were {what}",
                    allowed=f"at least {FEWEST} on either side",
                    fix="use more patients, or a larger data.test-fraction",
                )
        privacy = run.summary().privacy
        epsilon = float(privacy.epsilon) if privacy else math.inf
        delta = privacy.delta if privacy else 0.0
        findings = membership_findings(
            ratios(members),
            ratios(outsiders),
            epsilon=epsilon,
            delta=delta,
            references=len(models) - 1,
        )
        claim = "Nothing was claimed: the run has no differential privacy."
        if privacy:
            claim = claim_of(privacy.unit, epsilon, delta=delta, steps=privacy.planned_steps)
        claim += " This audit read the run's own patients; its figures are of all of them together."
        result = MembershipRecord(
            claim=claim,
            source=data.source,
            references=len(models) - 1,
            findings=tuple(findings),
            passed=all(finding.passed for finding in findings),
            seconds=round(time.monotonic() - started, 3),
        )
        run.write_json(MEMBERSHIP, result)
        page = write_audit_page(run, claim, findings)
    show(console, findings, page)
    return result


def _reference(path: Path, session: Session) -> Tensors:
    other = RunDirectory.open(path)
    found, ours = other.inputs(), session.adapter.a_fingerprint
    for what, theirs, wanted in (
        ("A", found.a, ours),
        ("backbone", found.backbone, session.spec.fingerprint),
    ):
        if theirs != wanted:
            raise UserError(
                f"{path} was trained with another {what} than the run",
                allowed="references with the run's own backbone and A",
                fix="leave it out, or train it with the same model and adapter sections",
            )
    return other.load_checkpoint().b


def split_records(
    hospitals: Sequence[Hospital], session: Session, config: Config
) -> tuple[list[Encoded], list[Encoded]]:
    """Return the records of patients trained on, and of those that were not."""
    inside = [one for hospital in hospitals for one in hospital.train]
    outside = [one for hospital in hospitals for one in (*hospital.validation, *hospital.test)]
    return encoded(inside, session, config), encoded(outside, session, config)
