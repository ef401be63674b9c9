"""The report of one or several runs: one offline HTML page and its markdown twin.

Both are rendered from the same blocks. The page carries its own plots (inline SVG) and refers to
nothing outside itself. Sample answers appear only where the data's source allows it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data.handling import handling_of
from common.errors import UserError
from common.evaluation.answers_file import read_answers
from common.files import write_json, write_text
from common.model.adapter.spec import SCHEMES
from common.rundir import RunDirectory
from common.wire.cohort import NOT_EVALUATED, WITHSTANDS_NOTHING
from sim.report.html import Block, to_html, to_markdown
from sim.report.plots import bytes_svg, epsilon_svg, loss_svg

NOTICE = "Research only, not for clinical use."
MODEL_NAMES = {
    "fedrx": "FedRx (trained B)",
    "untrained": "untrained backbone",
    "nearest_neighbours": "nearest neighbours",
    "logistic_regression": "logistic regression",
}
COLUMNS = (
    ("output_rate", "output rate"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("jaccard", "Jaccard"),
    ("f1", "F1"),
    ("length_ratio", "length ratio"),
    ("oov_rate", "out of vocabulary"),
)
RANDOM_WEIGHTS = (
    "The tiny backbone's weights are random: the run shows that everything works, and its answers "
    "mean nothing."
)
SAMPLE_CASES = 3
COMPARISON = "comparison.json"


def write_report(run: RunDirectory) -> Path:
    """Write report.html and report.md of one run; return the page's path."""
    blocks = run_blocks(run)
    title = f"FedRx: {run.config().run.name}"
    write_text(run.path / "report.md", to_markdown(title, blocks))
    page = run.path / "report.html"
    write_text(page, to_html(title, blocks))
    return page


def write_comparison(runs: Sequence[RunDirectory], target: Path) -> Path:
    """Write one page that compares several runs: figures side by side, then each run.

    Raises:
        UserError: if a run has not been finished, or the folder holds anything but an earlier
            comparison of the very same runs.
    """
    compared = {"runs": [str(run.path) for run in runs]}
    if target.exists() and any(target.iterdir()) and _read(target / COMPARISON) != compared:
        raise UserError(
            f"{target} holds something else",
            allowed="a new or empty folder, or an earlier comparison of these runs",
            fix="name another --out",
        )
    rows = []
    for run in runs:
        summary, config = run.read_json("summary.json"), run.config()
        metrics = summary.get("metrics", {}).get("fedrx", {})
        losses = summary.get("validation_loss") or [None]
        rows.append(
            (
                run.path.name,
                f"{config.adapter.mode} r{config.adapter.rank}",
                str(len(summary.get("hospitals", []))),
                str(summary.get("rounds", "–")),
                number(losses[-1]),
                *(number(metrics.get(key)) for key, _ in COLUMNS),
                megabytes(summary.get("wire", {}).get("bytes_up", 0)),
                _epsilon(summary),
            )
        )
    headers = (
        *("run", "adapter", "hospitals", "rounds", "validation loss"),
        *(name for _, name in COLUMNS),
        *("sent up", "epsilon"),
    )
    blocks = [Block(note=NOTICE, warning=True)]
    blocks.append(Block(title="Runs compared", headers=headers, rows=tuple(rows)))
    for run in runs:
        blocks.append(Block(title=f"Run {run.path.name}"))
        blocks.extend(run_blocks(run))
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / COMPARISON, compared)
    write_text(target / "report.md", to_markdown("FedRx: runs compared", blocks))
    page = target / "report.html"
    write_text(page, to_html("FedRx: runs compared", blocks))
    return page


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run_blocks(run: RunDirectory) -> list[Block]:
    """Return the blocks of one run.

    Raises:
        UserError: if the run has not been finished.
    """
    summary = run.read_json("summary.json")
    if not summary:
        raise UserError(
            f"{run.path} has no summary.json: the run has not finished",
            fix="finish it with `fedrx resume`, then ask for the report again",
        )
    source = summary.get("source", "credentialed")
    blocks = [
        Block(note=NOTICE, warning=True),
        Block(note=handling_of(source).report, warning=True),
        _what_ran(run, summary),
        *_incidents(run),
        *_losses(run),
        *_metrics(summary),
        *_hospitals(run, summary),
        *_wire(run, summary),
        *_privacy(run, summary),
        *_judgement(summary),
    ]
    if handling_of(source).is_open:
        blocks += _samples(run)
    return blocks


def peak_memory(summary: dict[str, Any]) -> str:
    """Say how much memory a run took, on the host and on a GPU.

    >>> peak_memory({"peak_rss_bytes": 2**30, "peak_device_bytes": 2**32})
    '1.00 GiB, on the GPU 4.00 GiB'
    """
    sizes = [("", summary["peak_rss_bytes"]), ("on the GPU ", summary.get("peak_device_bytes"))]
    return ", ".join(f"{where}{size / 2**30:.2f} GiB" for where, size in sizes if size)


def speed(summary: dict[str, Any], before: str = "") -> str:
    """Say how fast a worker trained, where that is told.

    >>> speed({"tokens_per_second": 19932.6}, ", "), speed({})
    (', 19,933 tokens/s in training', '')
    """
    found = summary.get("tokens_per_second")
    return f"{before}{found:,.0f} tokens/s in training" if found else ""


def _what_ran(run: RunDirectory, summary: dict[str, Any]) -> Block:
    config = run.config()
    adapter, train = summary["adapter"], config.train
    rows = [
        ("backbone", str(summary["backbone"]["name"])),
        ("adapter", f"{adapter['mode']}, rank {adapter['rank']}, alpha {adapter['alpha']:g}"),
        ("adapted projections", ", ".join(adapter["targets"])),
        ("trainable parameters", f"{summary['trainable_parameters']:,}"),
        ("optimizer", f"{train.optimizer}, learning rate {train.learning_rate:g}"),
        ("hospitals, rounds", f"{len(summary['hospitals'])}, {summary.get('rounds', '–')}"),
        ("device", str(summary["device"])),
        ("arithmetic", f"{summary['dtype']['value']} ({summary['dtype']['reason']})"),
        ("attention", f"{summary['attention']['kernel']} ({summary['attention']['reason']})"),
        ("backbone loads, workers", f"{summary['backbone_loads']}, {summary['workers']}"),
        ("time", f"{summary['seconds']:.0f} s"),
        *([("one worker's speed", speed(summary))] if speed(summary) else []),
        ("peak memory", peak_memory(summary)),
        ("sha256 of B", str(summary["b_sha256"])),
    ]
    rows += [("scaled", note) for note in summary.get("scaling", {}).get("notes", [])]
    return Block(title="What ran", headers=("", ""), rows=tuple(rows), text_cells=True)


def _incidents(run: RunDirectory) -> list[Block]:
    """Warn of rounds that were not evaluated, or in which a robust strategy was not robust."""
    notes = [
        f"Round {event['round']} was not evaluated: {event['value']}."
        for event in run.metrics(NOT_EVALUATED)
    ] + [
        f"Round {event['round']}: the strategy withstands nothing with {event['value']} updates."
        for event in run.metrics(WITHSTANDS_NOTHING)
    ]
    return [Block(note=note, warning=True) for note in notes]


def _losses(run: RunDirectory) -> list[Block]:
    events = run.metrics("validation-loss")
    if not events:
        return []
    note = "Mean cross-entropy per answer token on each hospital's validation patients."
    return [Block(title="Validation loss", note=note, svg=loss_svg(events))]


def _metrics(summary: dict[str, Any]) -> list[Block]:
    metrics = summary.get("metrics")
    if not metrics:
        return []
    rows = []
    for model, values in metrics.items():
        intervals = values.get("intervals", {})
        cells = [with_interval(values.get(key), intervals.get(key)) for key, _ in COLUMNS]
        rows.append((model_name(model, summary), *cells))
    first = next(iter(metrics.values()))
    note = (
        f"{first['samples']} held-out admissions of {first['patients']} patients; sets of drugs at "
        f"the {first['level']} level; macro means; an unparseable answer counts 0; 95% bootstrap "
        "intervals over patients. Precision and recall are the two readings of the paper's "
        "accuracy (over predicted, over true)."
    )
    headers = ("", *(name for _, name in COLUMNS))
    if summary["backbone"]["name"] == "tiny":
        note += " " + RANDOM_WEIGHTS
    return [
        Block(title="Answers on held-out patients", note=note, headers=headers, rows=tuple(rows))
    ]


def _hospitals(run: RunDirectory, summary: dict[str, Any]) -> list[Block]:
    sizes = {one["name"]: one for one in run.read_json("data.json").get("hospitals", [])}
    rows = []
    for one in summary["hospitals"]:
        # With privacy on no hospital tells its size.
        size = sizes.get(one["name"], {}) if one.get("patients") is not None else {}
        splits = (str(size.get(split, "–")) for split in ("train", "validation", "test"))
        told = ("–" if one.get(key) is None else str(one[key]) for key in ("patients", "samples"))
        rows.append((one["name"], *told, *splits))
    headers = ("hospital", "patients", "samples", "train", "validation", "test")
    return [Block(title="Hospitals", headers=headers, rows=tuple(rows))]


def _wire(run: RunDirectory, summary: dict[str, Any]) -> list[Block]:
    lines = run.lines("wire.jsonl")
    if not lines:
        return []
    wire = summary["wire"]
    note = (
        f"{len(wire['tensors'])} tensors, {matrices(summary)} only; {megabytes(wire['bytes_up'])} "
        f"from the hospitals, {megabytes(wire['bytes_down'])} to them."
    )
    return [Block(title="Bytes on the wire", note=note, svg=bytes_svg(lines))]


def _privacy(run: RunDirectory, summary: dict[str, Any]) -> list[Block]:
    lines, privacy = run.lines("privacy.jsonl"), summary.get("privacy")
    if not lines or not privacy:
        return []
    note = (
        f"({float(privacy['epsilon']):.3f}, {privacy['delta']:g})-differential privacy for each "
        f"{privacy['unit']}, {privacy['relation']}; accountant {privacy['accountant']}; noise: "
        f"{privacy['noise']}. Sizes, losses and metrics in this report are the simulation's own, "
        "outside the guarantee: no hospital sent them. The baselines beside them are fitted on "
        "the training patients without privacy."
    )
    unit = "step" if summary.get("mode") == "single" else "round"
    spent = {(line["round"], line["hospital"]): float(line["epsilon"]) for line in lines}
    hospitals = sorted({hospital for _, hospital in spent})
    rows = tuple(
        (str(place), *(number(spent.get((place, hospital))) for hospital in hospitals))
        for place in sorted({place for place, _ in spent})
    )
    headers = (f"epsilon after {unit}", *hospitals)
    return [
        Block(title="Privacy", note=note, headers=headers, rows=rows, svg=epsilon_svg(lines, unit))
    ]


def _epsilon(summary: dict[str, Any]) -> str:
    privacy = summary.get("privacy")
    return number(float(privacy["epsilon"])) if privacy else number(None)


def _judgement(summary: dict[str, Any]) -> list[Block]:
    blocks = []
    judge = summary.get("judge")
    if judge:
        # A run that was judged by an earlier version has one judge, without its name inside.
        judges = judge.get("judges") or {judge["model"]: judge}
        rows = tuple(
            (
                model_name(model, summary),
                name,
                number(values.get("mean")),
                str(values.get("scored", "–")),
                str(values.get("unscored", "–")),
            )
            for name, theirs in judges.items()
            for model, values in theirs["appropriateness"].items()
        )
        headers = ("", "judge", "appropriateness", "scored", "unscored")
        note = "Suitable drugs / all drugs, averaged over samples."
        blocks.append(Block(title="Judge", note=note, headers=headers, rows=rows))
    if summary.get("review"):
        blocks.append(_reviewers(summary))
    return blocks


def _reviewers(summary: dict[str, Any]) -> Block:
    review = summary["review"]
    rows = tuple(
        (
            model_name(model, summary),
            number(values["format_followed"]),
            number((values["similarity"] or {}).get("f1")),
            number((values["similarity_after_review"] or {}).get("f1")),
            number(values["kept_share"]),
            number(values["overall"]),
        )
        for model, values in review["models"].items()
    )
    headers = ("", "format followed", "F1 with true list", "F1 after review", "kept", "overall")
    agreement = review["agreement"]
    note = (
        f"{len(review['reviewers'])} reviewers, {review['cases']} cases; Krippendorff's alpha "
        f"{number(agreement['alpha_drugs'])} over drugs, {number(agreement['alpha_overall'])} over "
        "the overall marks."
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


def model_name(model: str, summary: dict[str, Any]) -> str:
    """Name a row of answers for people: a model, a baseline, or an earlier checkpoint of the run.

    >>> model_name("fedrx", {}), model_name("round-00001", {"rounds": 4})
    ('FedRx (trained B)', 'FedRx, round 1 of 4')
    """
    unit, _, count = model.partition("-")
    totals = {"round": summary.get("rounds"), "step": summary.get("scaling", {}).get("steps")}
    if totals.get(unit) and count.isdigit():
        return f"FedRx, {unit} {int(count)} of {totals[unit]}"
    return MODEL_NAMES.get(model, model)


def number(value: float | None) -> str:
    """Format a metric; an absent one is a dash.

    >>> number(0.12345), number(None)
    ('0.123', '–')
    """
    return "–" if value is None else f"{value:.3f}"


def with_interval(value: float | None, interval: Sequence[float | None] | None) -> str:
    """Format a metric with its interval.

    >>> with_interval(0.5, [0.4, 0.6])
    '0.500 (0.40–0.60)'
    """
    if value is None or not interval or None in interval:
        return number(value)
    return f"{value:.3f} ({interval[0]:.2f}–{interval[1]:.2f})"


def matrices(summary: dict[str, Any]) -> str:
    """Name the matrices that a run trains and sends.

    >>> matrices({"adapter": {"mode": "fa-lora"}}), matrices({"adapter": {"mode": "lora"}})
    ('B', 'A and B')
    """
    held = SCHEMES[summary["adapter"]["mode"]].held
    return " and ".join(part.removeprefix("lora_") for part in held)


def megabytes(count: float) -> str:
    """Format bytes.

    >>> megabytes(2_500_000)
    '2.50 MB'
    """
    return f"{count / 1e6:.2f} MB"
