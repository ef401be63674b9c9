"""``fedrx audit``: what the privacy code really does, measured against what it claims."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from common.config import Config
from common.errors import RunFailed, UserError
from common.model.adapter.layout import adapter_spec
from common.model.session import Session, open_session
from common.privacy.accounting import epsilon
from common.privacy.audit import inversion_test, noise_test, one_run_audit
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.isolation import check_backbone
from common.privacy.plan import PrivacyPlan
from common.privacy.settings import is_private, plan_of, protects, with_calibrated_noise
from common.records import Record
from common.records.checks import AuditSummary, Finding
from common.seeds import torch_stream
from common.text.batches import Encoded, pack
from common.training.gradients import StepLoss, add_unit_gradients
from common.training.worker import Worker
from sim.checks.audit_loop import audit_loop
from sim.checks.audit_page import NOT_COVERED, cells, claim_of, write_audit_page
from sim.process.progress import SILENT, Console
from sim.report.terminal import table
from sim.runs.lifecycle import Kind, Run, start
from sim.runs.stages import AUDIT

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
    console: Console = SILENT,
    command_line: Sequence[str],
    run_dir: Path | None = None,
    canaries: int = 0,
) -> Record:
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

    Raises:
        UserError: if privacy is off, or protects whole hospitals.
        RunFailed: if a finding refutes the claim, after everything is written.
    """
    kind = partial(Audit, canaries)
    return start(config, kind, console=console, command_line=command_line, run_dir=run_dir).result


@dataclass
class Audit(Kind):
    """Attacks and checks in the place of training."""

    mode = "audit"
    resumable = False
    canaries: int
    """See ``audit``."""

    def resolve(self, config: Config) -> Config:
        """Refuse a configuration without anything to audit; calibrate its noise."""
        if protects(config) and not is_private(config):
            raise UserError(
                "privacy.unit=hospital: the audit covers the release of clipped and noised "
                "gradients inside a hospital; here the server noises whole updates instead",
                allowed="patient, admission",
                fix="set privacy.unit",
            )
        if not is_private(config):
            raise UserError(
                "there is nothing to audit: privacy is off",
                fix="set privacy.target-epsilon, or name hospitals-dp.toml",
            )
        if adapter_spec(config.adapter).scheme.block(1):
            raise UserError(
                f"adapter.mode={config.adapter.mode}: rounds train parts of the adapter in turn, "
                "and the audit takes releases of the whole apart",
                allowed="fa-lora, lora",
                fix="set adapter.mode=lora: the mechanism, plan and ledger are the same",
            )
        config = with_calibrated_noise(config)
        if plan_of(config).deterministic_noise:
            raise UserError(
                "privacy.deterministic-noise=true protects nobody: there is nothing to audit",
                fix="set privacy.deterministic-noise=false",
            )
        return config

    def prepare(self, config: Config, console: Console, worker: Worker) -> None:
        """Find the backbone; no data is read."""
        say = partial(console.say, style="dim")
        self.backbone = worker.backbone_to_open(config, progress=say)
        check_backbone(self.backbone)

    def place(self, run: Run) -> Mapping[str, object]:
        """Return the only stage that an audit has."""
        return {"stage": AUDIT}

    def train(self, run: Run) -> AuditSummary:
        """Attack, and sum up what was found."""
        config = run.config
        run.enter(AUDIT)
        plan, spec, train = plan_of(config), adapter_spec(config.adapter), config.train
        found = [one_run_audit(plan, canaries=CANARIES), one_run_control(plan), noise_test(plan)]
        session = open_session(
            self.backbone,
            spec,
            device=train.device,
            dtype=train.dtype,
            attention=config.model.attention,
            kernels=config.model.kernels,
            weights=config.model.weights,
            threads=train.threads or None,
        )
        default = LOOP_CANARIES if config.model.backbone == "tiny" else LOOP_CANARIES_LARGE
        found += audit_loop(session, config, canaries=self.canaries or default)
        if "v_proj" in spec.targets and spec.rank > 1:
            found += inversion(session, plan)
        return AuditSummary(
            plan=asdict(plan),
            findings=tuple(found),
            passed=all(finding.passed for finding in found),
            not_covered=NOT_COVERED,
            seconds=round(run.seconds, 3),
        )

    def report(self, run: Run, result: AuditSummary) -> None:
        """Write the page and show what was found; a claim that is refuted fails the run."""
        plan = plan_of(run.config)
        claim = claim_of(plan.unit, epsilon(plan).value, delta=plan.delta, steps=plan.steps)
        page = write_audit_page(run.directory, claim, result.findings)
        show(run.console, result.findings, page)
        refuted = [f"{one.audit}: {one.verdict}" for one in result.findings if not one.passed]
        if refuted:
            raise RunFailed("; ".join(refuted))

    def show(self, run: Run, result: AuditSummary) -> None:
        """Show nothing more."""


def one_run_control(plan: PrivacyPlan) -> Finding:
    """Audit the same release without its noise: it has to be caught."""
    # without noise every run guesses everyone rightly: one is enough
    bare = one_run_audit(
        plan, canaries=CANARIES, release=lambda sums: sums / plan.expected_batch, repeats=1
    )
    caught = not bare.passed
    control = {
        "audit": "one-run audit, control without noise",
        "false_alarm": 0.0,
        # where the claim is beyond any audit of this size, the control says so and is no failure
        "passed": caught or not bare.has_power,
        "verdict": "caught, as it should be" if caught else bare.verdict,
    }
    return bare.model_copy(update=control)


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


def show(console: Console, findings: Sequence[Finding], page: Path) -> None:
    """Tell the findings as a table, what they mean, and where the page is."""
    headers = ("audit", "figure", "if the claim is true", "95% interval", "limit", "verdict")
    rows = [(one.audit, *cells(one)[2:-1], one.verdict) for one in findings]
    console.say(table(headers, rows, styles=["" if one.passed else "red" for one in findings]))
    for finding in findings:
        line = f"{finding.audit}: {finding.meaning}"
        if finding.false_alarm:
            line += f" (a sound mechanism fails with at most {finding.false_alarm:.1e})"
        console.say(line, style="dim")
    console.say(f"not covered: {NOT_COVERED}", style="dim")
    console.say(f"page: {page}")
