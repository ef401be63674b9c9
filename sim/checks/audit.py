"""``fedrx audit``: what the privacy code really does, measured against what it claims."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common.config import Config
from common.errors import FedrxError, RunFailed, UserError
from common.model.adapter.layout import adapter_spec
from common.model.backbone.load import resolve_backbone
from common.model.session import Session, open_session
from common.privacy.accounting import epsilon
from common.privacy.audit import inversion_test, noise_test, one_run_audit
from common.privacy.budget.receipts import json_number
from common.privacy.findings import Finding
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.isolation import check_backbone
from common.privacy.plan import PrivacyPlan
from common.privacy.settings import is_private, plan_of, protects, with_calibrated_noise
from common.provenance import environment
from common.rundir import RunDirectory
from common.seeds import torch_stream
from common.text.batches import Encoded, pack
from common.training.gradients import StepLoss, add_unit_gradients
from sim.checks.audit_loop import audit_loop
from sim.checks.audit_page import (
    NOT_COVERED,
    claim_of,
    show_interval,
    show_number,
    write_audit_page,
)

CANARIES = 5000
LOOP_CANARIES, LOOP_CANARIES_LARGE = 600, 120
"""Canary patients of each attacked run of the loop, on the tiny backbone and on a larger one."""
RECORDS = 12


class BareGradient(PrivateGradient):
    """The inversion's control: the record's gradient, neither clipped nor noised."""

    def __call__(self, session: Session, step: int) -> StepLoss:
        """Write the bare gradient."""
        rows_1P = torch.zeros(1, session.adapter.trainable_parameters, device=session.torch_device)
        add_unit_gradients(session, pack(self.dataset), (0,), rows_1P)
        session.adapter.flat_grad.copy_(rows_1P[0])
        return StepLoss(loss_sum=None, label_tokens=0, packed_tokens=0)


def audit(
    config: Config,
    *,
    console: Console,
    command_line: Sequence[str],
    run_dir: Path | None = None,
    canaries: int = 0,
) -> dict[str, Any]:
    """Audit a configuration's privacy: the mechanism, the whole loop under watch, inversion.

    No patient data is read: canaries and records are made up. Controls run the same attacks on
    broken variants, so that a pass is known to mean something. audit.html says what was claimed,
    tried and found, and what remains unaudited. Each finding has the probability with which a
    correct mechanism fails it, below 1e-4.

    Args:
        config: With privacy on.
        console: Where findings are shown.
        command_line: Stored in environment.json.
        run_dir: Run directory; default below ``runs``.
        canaries: Of each attacked run of the loop; 0: 600 on the tiny backbone, else 120.

    Returns:
        The content of summary.json: the plan and every finding.

    Raises:
        UserError: if privacy is off, or protects whole hospitals.
        RunFailed: if a finding refutes the claim, after everything is written.
    """
    started = time.monotonic()
    RunDirectory.require_new(config, directory=run_dir)
    if protects(config) and not is_private(config):
        raise UserError(
            "privacy.unit=hospital: the audit covers the release of clipped and noised gradients "
            "inside a hospital; here the server noises whole updates instead",
            allowed="patient, admission",
            fix="set privacy.unit",
        )
    if not is_private(config):
        raise UserError(
            "there is nothing to audit: privacy is off",
            fix="set privacy.target-epsilon, or name hospitals-dp.toml",
        )
    config = with_calibrated_noise(config)
    plan = plan_of(config)
    if plan.deterministic_noise:
        raise UserError(
            "privacy.deterministic-noise=true protects nobody: there is nothing to audit",
            fix="set privacy.deterministic-noise=false",
        )
    backbone = resolve_backbone(
        config.model.backbone, progress=lambda line: console.print(line, style="dim")
    )
    check_backbone(backbone)
    run = RunDirectory.create(config, directory=run_dir)
    run.write_json("environment.json", environment(list(command_line)))
    run.write_status("running", stage="audit")
    findings = [one_run_audit(plan, canaries=CANARIES), one_run_control(plan), noise_test(plan)]
    train = config.train
    session = open_session(
        backbone,
        adapter_spec(config.adapter),
        device=train.device,
        dtype=train.dtype,
        attention=config.model.attention,
        kernels=config.model.kernels,
        weights=config.model.weights,
        threads=train.threads or None,
    )
    default = LOOP_CANARIES if config.model.backbone == "tiny" else LOOP_CANARIES_LARGE
    try:
        findings += audit_loop(session, config, canaries=canaries or default)
    except FedrxError as error:
        # a ledger that finds itself wronged stops the run: that refutes the code too
        run.write_status("failed", stage="audit", error=str(error))
        raise
    if "v_proj" in adapter_spec(config.adapter).targets and config.adapter.rank > 1:
        findings += inversion(session, plan)
    summary = {
        "plan": plan.to_dict(),
        "findings": [plain(finding) for finding in findings],
        "passed": all(finding.passed for finding in findings),
        "not_covered": NOT_COVERED,
        "seconds": round(time.monotonic() - started, 3),
    }
    run.write_json("summary.json", summary)
    page = write_audit_page(run, claim_of(plan.to_dict(), epsilon(plan).value), findings)
    show(console, findings)
    console.print(f"page: {page}", markup=False, highlight=False)
    console.print(f"run directory: {run.path}", markup=False, highlight=False)
    refuted = [finding for finding in findings if not finding.passed]
    run.write_status("failed" if refuted else "finished", stage="audit")
    if refuted:
        raise RunFailed("; ".join(f"{one.audit}: {one.verdict}" for one in refuted))
    return summary


def one_run_control(plan: PrivacyPlan) -> Finding:
    """Audit the same release without its noise: it has to be caught."""
    # without noise every run guesses everyone rightly: one is enough
    bare = one_run_audit(
        plan, canaries=CANARIES, release=lambda sums: sums / plan.expected_batch, repeats=1
    )
    caught = not bare.passed
    verdict = "caught, as it should be" if caught else bare.verdict
    return replace(
        bare,
        audit="one-run audit, control without noise",
        false_alarm=0.0,
        # where the claim is beyond any audit of this size, the control says so and is no failure
        passed=caught or verdict.startswith("no power"),
        verdict=verdict,
    )


def inversion(session: Session, plan: PrivacyPlan) -> list[Finding]:
    """Attack made-up records, bare and under the plan."""
    tokens = max(1, session.adapter.spec.rank // 2)
    records = [_record(session, tokens, place) for place in range(RECORDS)]
    return [
        inversion_test(session, records, plan, kind=BareGradient, expect_private=False),
        inversion_test(session, records, plan),
    ]


def _record(session: Session, tokens: int, place: int) -> Encoded:
    generator = torch_stream(0, "audit-record", place)
    vocabulary = int(session.model.config.vocab_size)
    ids = torch.randperm(vocabulary, generator=generator)[: tokens + 1].tolist()
    return Encoded(input_ids=tuple(ids), answer_start=tokens, unit=place)


def plain(finding: Finding) -> dict[str, Any]:
    """Return a finding for strict JSON."""
    values = asdict(finding)
    values["figure"], values["limit"] = json_number(finding.figure), json_number(finding.limit)
    if finding.interval:
        values["interval"] = [json_number(end) for end in finding.interval]
    return values


def show(console: Console, findings: Sequence[Finding]) -> None:
    """Print the findings as a table."""
    table = Table("audit", "figure", "if the claim is true", "95% interval", "limit", "verdict")
    for finding in findings:
        style = None if finding.passed else "red"
        cells = (
            finding.audit,
            show_number(finding.figure),
            show_number(finding.null),
            show_interval(finding.interval),
            show_number(finding.limit, "no limit"),
            finding.verdict,
        )
        table.add_row(*cells, style=style)
    console.print(table)
    for finding in findings:
        line = f"{finding.audit}: {finding.meaning}"
        if finding.false_alarm:
            line += f" (a sound mechanism fails with at most {finding.false_alarm:.1e})"
        console.print(line, style="dim", markup=False, highlight=False)
    console.print(f"not covered: {NOT_COVERED}", style="dim", markup=False, highlight=False)
