"""The report of one run: one offline HTML page and its markdown twin, from the same blocks.

The page says what came out first, then how it came about, then what ran with all that decides it.
It carries its own plots (inline SVG) and refers to nothing outside itself. Sample answers appear
only where the data's source allows it.
"""

from collections.abc import Sequence
from pathlib import Path

from common.data.handling import handling_of
from common.errors import UserError
from common.evaluation.answers_file import read_answers
from common.privacy.budget.receipts import privacy_lines
from common.privacy.forecast import verdict
from common.privacy.settings import plan_of
from common.records.judged import Reviewed
from common.records.run import Metric
from common.records.summary import Figures, Summary
from common.rundir import RunDirectory
from common.wire.cohort import NOT_EVALUATED, WITHSTANDS_NOTHING
from sim.report.html import Bar, Block, write_page
from sim.report.plots import bytes_svg, epsilon_svg, lines_svg, loss_svg, together
from sim.report.ranking_blocks import ranking_blocks
from sim.report.what_ran import settings, what_ran
from sim.report.words import (
    COLUMNS,
    NOTICE,
    PERSONAL_NOTE,
    RANDOM_WEIGHTS,
    figure,
    matrices,
    megabytes,
    model_name,
    number,
)

SAMPLE_CASES = 3
_BASELINES = ("popularity", "nearest_neighbours", "logistic_regression")
_PRIVACY_FACTS = {
    "noise_multiplier": "noise multiplier",
    "sampling_rate": "sampling rate q",
    "clip_norm": "clip norm",
    "expected_batch": "expected batch",
    "planned_steps": "steps paid for",
}


def write_report(run: RunDirectory) -> Path:
    """Write report.html and report.md of one run; return the page's path."""
    title = f"FedRx: {run.config().run.name}"
    return write_page(run.path / "report.html", title, run_blocks(run))


def finished_summary(run: RunDirectory) -> Summary:
    """Return a run's summary.

    Raises:
        UserError: if the run has not been finished.
    """
    summary = run.summary()
    if not summary.b_sha256:
        raise UserError(
            f"{run.path} has no summary.json: the run has not finished",
            fix="finish it with `fedrx resume`, then ask for the report again",
        )
    return summary


def run_blocks(run: RunDirectory) -> list[Block]:
    """Return the blocks of one run.

    Raises:
        UserError: if the run has not been finished.
    """
    summary, config = finished_summary(run), run.config()
    blocks = [
        Block(note=f"{NOTICE} {handling_of(summary.source).report}", warning=True),
        *_result(summary),
        *_incidents(run),
        *_losses(run, summary),
        *_metrics(summary),
        *ranking_blocks(summary),
        *([Block(note=PERSONAL_NOTE, warning=True)] if "personal" in summary.metrics else []),
        _hospitals(run, summary),
        *_privacy(run, summary),
        what_ran(config, summary),
        settings(config),
        *_wire(run, summary),
        *_judgement(summary),
    ]
    if handling_of(summary.source).is_open:
        blocks += _samples(run)
    return blocks


def _result(summary: Summary) -> list[Block]:
    """Say first what came out: F1 against the others, or the loss where nothing was answered."""
    metrics = summary.metrics
    if "fedrx" not in metrics:
        losses = summary.validation_loss or (None,)
        note = f"Validation loss {number(losses[0])} at the start, {number(losses[-1])} at the end."
        return [Block(note=note, lead=True)] if losses[-1] is not None else []
    ours = metrics["fedrx"]
    sides: dict[str, list[str]] = {"above": [], "below": [], "not clearly apart from": []}
    for model, values in metrics.items():
        if model != "fedrx":
            sides[_side(ours, values)].append(f"{model_name(model, summary)} {number(values.f1)}")
    against = "; ".join(f"{side} {', '.join(names)}" for side, names in sides.items() if names)
    mine = ours.interval("f1")
    interval = f" (95% interval {mine[0]:.2f} to {mine[1]:.2f})" if mine else ""
    note = (
        f"F1 of the trained B on {ours.samples} held-out admissions: "
        f"{number(ours.f1)}{interval}" + (f"; {against}." if against else ".")
    )
    bars = [
        Bar(
            name=model_name(model, summary),
            value=values.f1,
            text=figure(values, "f1"),
            interval=values.interval("f1"),
            ours=model == "fedrx",
        )
        for model, values in sorted(metrics.items(), key=lambda one: -(one[1].f1 or 0))
    ]
    blocks = [Block(note=note, lead=True, bars=tuple(bars))]
    if summary.backbone and summary.backbone.name == "tiny":
        blocks.append(Block(note=RANDOM_WEIGHTS, warning=True))
    return blocks


def _side(ours: Figures, theirs: Figures) -> str:
    """Tell where F1 lies by the intervals, which overlap long before a paired test would."""
    mine, other = ours.interval("f1"), theirs.interval("f1")
    if mine is None or other is None or (mine[0] <= other[1] and other[0] <= mine[1]):
        return "not clearly apart from"
    return "above" if mine[0] > other[1] else "below"


def _incidents(run: RunDirectory) -> list[Block]:
    """Warn of rounds that were not evaluated, or in which a robust strategy was not robust."""
    notes = [
        f"Round {event.round} was not evaluated: {event.value}."
        for event in run.metrics(NOT_EVALUATED)
    ] + [
        f"Round {event.round}: the strategy withstands nothing with {event.value} updates."
        for event in run.metrics(WITHSTANDS_NOTHING)
    ]
    return [Block(note=note, warning=True) for note in notes]


def _losses(run: RunDirectory, summary: Summary) -> list[Block]:
    shown = [
        (where, loss_svg(events, label))
        for where, name, label in (
            ("on each hospital's validation patients", "validation-loss", "validation loss"),
            ("on what was trained on", "train-loss", "training loss"),
        )
        if (events := run.metrics(name))
    ]
    notes = ""
    if public := summary.public_validation:
        where = f"on {public.samples} made-up admissions that no hospital has"
        svg = lines_svg(
            {}, x_label=public.unit, y_label="loss on made-up patients", mean=public.losses
        )
        shown.append((where, svg))
        notes = (
            " That on made-up ones was measured after training, with what every round had "
            "released: no hospital's data is read for it, and it costs no privacy."
        )
    if not shown:
        return []
    places = ", ".join(where for where, _ in shown)
    note = f"Mean cross-entropy per answer token: {places}.{notes}"
    return [Block(title="Learning curves", note=note, svgs=tuple(svg for _, svg in shown))]


def _metrics(summary: Summary) -> list[Block]:
    metrics = summary.metrics
    if not metrics:
        return []
    rows = []
    for model, values in metrics.items():
        cells = [figure(values, key) for key, _ in COLUMNS]
        rows.append((model_name(model, summary), *cells))
    first = next(iter(metrics.values()))
    note = (
        f"{first.samples} held-out admissions of {first.patients} patients; sets of drugs at "
        f"the {first.level} level; macro means; an unparseable answer counts 0; 95% bootstrap "
        "intervals over patients. Precision and recall are the two readings of the paper's "
        "accuracy (over predicted, over true)."
    )
    if any(model in metrics for model in _BASELINES) and len(summary.hospitals) > 1:
        note += (
            " Popularity, nearest neighbours and logistic regression are fitted in each hospital, "
            "on its own training patients, and answer its own cases."
        )
    headers = ("", *(name for _, name in COLUMNS))
    return [
        Block(title="Answers on held-out patients", note=note, headers=headers, rows=tuple(rows))
    ]


def _hospitals(run: RunDirectory, summary: Summary) -> Block:
    sizes = {one.name: one for one in run.data().hospitals}
    private = summary.privacy
    spent = {one.hospital: float(one.epsilon) for one in private.per_hospital} if private else {}
    validation, train = run.metrics("validation-loss"), run.metrics("train-loss")
    rows = []
    for one in summary.hospitals:
        name = one.name
        # With privacy on no hospital tells its size.
        size = sizes.get(name) if one.patients is not None else None
        splits = map(str, (size.train, size.validation, size.test) if size else "–––")
        counts = ("–" if size is None else str(size) for size in (one.patients, one.samples))
        first, last = _ends(validation, name)
        trained = _ends(train, name)[1]
        losses = (number(first), number(last), number(trained))
        epsilon = (number(spent[name]),) if name in spent else ()
        rows.append((name, *counts, *splits, *losses, *epsilon))
    headers = (
        *("hospital", "patients", "samples", "train", "validation", "test"),
        *("validation loss, first", "last", "training loss, last"),
        *(("epsilon",) if spent else ()),
    )
    note = ""
    if private and any(one.patients is None for one in summary.hospitals):
        note = "With privacy no counts and no losses leave a hospital: a dash stands for each."
    return Block(title="Hospitals", note=note, headers=headers, rows=tuple(rows))


def _ends(events: Sequence[Metric], hospital: str) -> tuple[float | None, float | None]:
    values = [event.number for event in events if event.hospital == hospital]
    return (values[0], values[-1]) if values else (None, None)


def _privacy(run: RunDirectory, summary: Summary) -> list[Block]:
    lines, privacy = privacy_lines(run), summary.privacy
    if not lines or not privacy:
        return []
    facts = [
        (label, f"{value:g}")
        for key, label in _PRIVACY_FACTS.items()
        if (value := getattr(privacy, key))
    ]
    if privacy.noise_multiplier:
        ratio = plan_of(run.config()).noise_to_signal(summary.trainable_parameters)
        facts.append(("noise over signal, per step", f"{ratio:.3g}: {verdict(ratio)}"))
    note = (
        f"({float(privacy.epsilon):.3f}, {privacy.delta:g})-differential privacy for each "
        f"{privacy.unit}, {privacy.relation}; accountant {privacy.accountant}; noise: "
        f"{privacy.noise}. Sizes, losses and metrics in this report are the simulation's own, "
        "outside the guarantee: no hospital sent them. The baselines beside them are fitted on "
        "the training patients without privacy."
    )
    if summary.public_validation:
        note += " The loss on made-up patients needed no hospital's data and spent nothing."
    unit = "step" if summary.mode == "single" else "round"
    places = sorted({line.round for line in lines})
    spent = {(line.hospital, line.round): float(line.epsilon) for line in lines}
    equal: dict[tuple[str, ...], list[str]] = {}
    for hospital in sorted({hospital for hospital, _ in spent}):
        column = tuple(number(spent.get((hospital, place))) for place in places)
        equal.setdefault(column, []).append(hospital)
    rows = tuple((str(place), *cells) for place, *cells in zip(places, *equal, strict=True))
    headers = (f"epsilon after {unit}", *map(together, equal.values()))
    return [
        Block(title="Privacy", note=note, rows=tuple(facts), headers=("", ""), text_cells=True),
        Block(headers=headers, rows=rows, svgs=(epsilon_svg(lines, unit),)),
    ]


def _wire(run: RunDirectory, summary: Summary) -> list[Block]:
    lines, wire = run.wire(), summary.wire
    if not lines or not wire:
        return []
    note = (
        f"{len(wire.tensors)} tensors, {matrices(summary)} only; {megabytes(wire.bytes_up)} "
        f"from the hospitals, {megabytes(wire.bytes_down)} to them."
    )
    return [Block(title="Bytes on the wire", note=note, svgs=(bytes_svg(lines),))]


def _judgement(summary: Summary) -> list[Block]:
    blocks = []
    judge = summary.judge
    if judge:
        # A run that was judged by an earlier version has one judge, without its name inside.
        judges = judge.judges or {judge.model: judge}
        rows = tuple(
            (
                model_name(model, summary),
                name,
                number(values.mean),
                str(values.scored),
                str(values.unscored),
            )
            for name, theirs in judges.items()
            for model, values in theirs.appropriateness.items()
        )
        headers = ("", "judge", "appropriateness", "scored", "unscored")
        note = "Suitable drugs / all drugs, averaged over samples."
        blocks.append(Block(title="Judge", note=note, headers=headers, rows=rows))
    if summary.review:
        blocks.append(_reviewers(summary, summary.review))
    return blocks


def _reviewers(summary: Summary, review: Reviewed) -> Block:
    rows = tuple(
        (
            model_name(model, summary),
            number(values.format_followed),
            number((values.similarity or {}).get("f1")),
            number((values.similarity_after_review or {}).get("f1")),
            number(values.kept_share),
            number(values.overall),
        )
        for model, values in review.models.items()
    )
    headers = ("", "format followed", "F1 with true list", "F1 after review", "kept", "overall")
    note = (
        f"{len(review.reviewers)} reviewers, {review.cases} cases; Krippendorff's alpha "
        f"{number(review.agreement.alpha_drugs)} over drugs, "
        f"{number(review.agreement.alpha_overall)} over the overall marks."
    )
    return Block(title="Reviewers", note=note, headers=headers, rows=rows)


def _samples(run: RunDirectory) -> list[Block]:
    answers = [r for r in read_answers(run) if r.model == "fedrx"]
    rows = []
    for row in answers[:SAMPLE_CASES]:
        answer = "not in the format" if row.answer is None else "; ".join(row.answer)
        rows.append((row.case, "; ".join(row.diagnoses), "; ".join(row.truth), answer))
    if not rows:
        return []
    headers = ("case", "diagnoses", "ordered drugs", "suggested")
    return [Block(title="Sample answers", headers=headers, rows=tuple(rows), text_cells=True)]
