"""The audit's page, for who has to answer for the data: claim, attacks, outcome, what is left."""

from collections.abc import Sequence
from pathlib import Path

from common.records.checks import Finding
from common.rundir import RunDirectory
from sim.report.html import Block, write_page

QUESTIONS = {
    "one-run audit": "With the best view that anyone can have of a single release, how surely can "
    "made-up patients who took part be told from those who did not?",
    "one-run audit, control without noise": "Does that attack succeed when there is no noise?",
    "noise test": "Is the noise as strong as claimed, of the right shape, and never repeated?",
    "one-run audit of the loop": "The same question about whole training runs: by what is released "
    "in all steps, who was in the hospital?",
    "membership in the loop": "Does a run give its patients away more than the claimed protection "
    "allows?",
    "membership in the loop, control without noise": "Does that attack succeed without the noise?",
    "releases taken apart": "Does a release hold anything but each patient's limited contribution "
    "and one portion of secret noise, also when no patient was drawn?",
    "noise in the loop": "Is that portion as strong as claimed, in every step, and never repeated?",
    "draws": "Is who takes part in a step decided by a secret coin of each patient's own, at the "
    "claimed rate?",
    "patients in one pass": "Is each patient's contribution computed apart where the arithmetic "
    "would mix neighbours?",
    "ledger": "Is every release paid for before it is made, and does the receipt say so?",
    "what is sent": "Does what leaves the hospital hold anything but what the releases make of the "
    "model before?",
    "inversion without privacy": "Can words be read off the contribution of one patient without "
    "protection?",
    "inversion test": "Can they still be read with it?",
    "membership of patients": "By the trained model alone, can the patients it was trained on be "
    "told from others?",
    "membership, true positives at 1% false": "If only one outsider in a hundred may be accused, "
    "how many of the patients trained on are found?",
    "membership, true positives at 0.1% false": "And if only one in a thousand may be?",
}
NOT_COVERED = (
    "An audit can refute a claim; it cannot prove one. The guarantee itself rests on the published "
    "theorems and on the tests of this code. "
    "Not attacked here: whoever controls the hospital's own machine; how long a hospital takes to "
    "answer; several runs on the same patients, whose epsilons add up; what a model says about a "
    "group of patients; the tables' own preparation. Patients and records of an audit are made up, "
    "unless it says that it read a run."
)


def cells(finding: Finding) -> tuple[str, ...]:
    """Return a finding as a row: audit, question, figure, null, interval, limit, verdict."""
    return (
        finding.audit,
        QUESTIONS[finding.audit],
        show_number(finding.figure),
        show_number(finding.null),
        show_interval(finding.interval),
        show_number(finding.limit, "no limit"),
        finding.verdict if finding.passed else f"FAILED: {finding.verdict}",
    )


def audit_blocks(claim: str, findings: Sequence[Finding]) -> list[Block]:
    """Return the page's blocks."""
    headers = (
        *("attack or check", "what was asked", "figure", "if the claim is true", "95% interval"),
        *("limit", "verdict"),
    )
    failed = [one.audit for one in findings if not one.passed]
    outcome = (
        f"Refuted by: {', '.join(failed)}."
        if failed
        else f"All {len(findings)} attacks and checks came out as the claim says."
    )
    total = sum(one.false_alarm for one in findings)
    return [
        Block(title="The claim", note=claim),
        Block(title="What came out", note=outcome, warning=bool(failed)),
        Block(
            title="What was attacked",
            headers=headers,
            rows=tuple(map(cells, findings)),
            text_cells=True,
        ),
        Block(
            title="How to read the figures",
            note="A limit is where the claim would be refuted. A sound system is accused by "
            f"accident with a probability of at most {total:.1e} in the whole audit; exact checks "
            "never are. " + " ".join(f"{one.audit}: {one.meaning}." for one in findings),
        ),
        Block(title="What is not covered", note=NOT_COVERED),
    ]


def write_audit_page(run: RunDirectory, claim: str, findings: Sequence[Finding]) -> Path:
    """Write audit.html and audit.md; return the page's path."""
    title = f"FedRx privacy audit: {run.config().run.name}"
    return write_page(run.path / "audit.html", title, audit_blocks(claim, findings))


def claim_of(unit: str, epsilon: float, *, delta: float, steps: int) -> str:
    """Return the claim in words.

    >>> claim_of("patient", 5.999, delta=1e-4, steps=20)[:60]
    'Whether any one patient was in a hospital changes the probab'
    """
    return (
        f"Whether any one {unit} was in a hospital changes the probability of whatever "
        f"leaves it by at most the factor e^{epsilon:.3g}, except with probability "
        f"{delta:g} (differential privacy, epsilon {epsilon:.3g}), over {steps} "
        "training steps."
    )


def show_number(value: float | None, infinite: str = "infinite") -> str:
    """Format a figure.

    >>> show_number(0.123456), show_number(None), show_number(float("inf"), "no limit")
    ('0.1235', '–', 'no limit')
    """
    if value is None:
        return "–"
    return infinite if value == float("inf") else f"{value:.4g}"


def show_interval(interval: tuple[float, float] | None) -> str:
    """Format an interval.

    >>> show_interval((0.5, 0.75)), show_interval((1.0, float("inf"))), show_interval(None)
    ('0.5 to 0.75', 'above 1', 'exact')
    """
    if interval is None:
        return "exact"
    low, high = interval
    return f"above {low:.4g}" if high == float("inf") else f"{low:.4g} to {high:.4g}"
