"""One page that compares runs, or the arms of a sweep: what differs, and what that changed.

Figures of runs that answered other test cases stand beside each other without a ranking. Where the
cases are the same, differences are paired: case by case, with an interval over patients.
"""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.configio import file_keys, flatten
from common.data.handling import SYNTHETIC, handling_of
from common.errors import UserError
from common.evaluation.answers_file import read_answers
from common.evaluation.metrics import drug_map_of, f1_by_admission, interval_of_mean
from common.files import write_json, write_text
from common.records.summary import Figures, Summary
from common.rundir import RunDirectory
from sim.report.html import Bar, Block, to_html, write_page
from sim.report.plots import Points, lines_svg
from sim.report.run_report import finished_summary
from sim.report.what_ran import PLACES
from sim.report.words import (
    COLUMNS,
    NOTICE,
    figure,
    megabytes,
    number,
    personal_note,
    setting,
    stands_for,
)

COMPARISON = "comparison.json"
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run as the comparison needs it."""

    run: RunDirectory
    summary: Summary
    settings: Mapping[str, object]
    """Every key that can change a result."""
    f1_by_case: Mapping[str, float]
    """By what the case is: patient, diagnoses, truth and level. Never shown."""
    clusters: Mapping[str, int]


def write_comparison(runs: Sequence[RunDirectory], target: Path) -> Path:
    """Write one page that compares several runs; return its path.

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
    groups = {name: [one] for name, one in zip(_names(runs), map(read_run, runs), strict=True)}
    blocks = [*_notices(groups), *_standing(groups), *comparison_blocks(groups)]
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / COMPARISON, compared)
    return write_page(target / "report.html", "FedRx: runs compared", blocks)


def write_sweep_page(
    arms: Mapping[str, Sequence[RunDirectory]], table: Block, target: Path
) -> Path:
    """Write the page of a sweep.

    Args:
        arms: The runs of each arm.
        table: Figures of the arms over seeds.
        target: The page.
    """
    groups = {name: [read_run(run) for run in runs] for name, runs in arms.items()}
    blocks = [*_notices(groups), table, *comparison_blocks(groups)]
    write_text(target, to_html("FedRx: arms of a sweep", blocks))
    return target


def read_run(run: RunDirectory) -> Compared:
    """Read what a comparison needs of a run.

    Raises:
        UserError: if it has not been finished.
    """
    summary, config = finished_summary(run), run.config()
    rows = [row for row in read_answers(run) if row.model == stands_for(summary)]
    level, drug_map = config.data.normalisation, drug_map_of(config.data)
    found: dict[str, float] = {}
    clusters: dict[str, int] = {}
    twins: Counter[str] = Counter()
    scores = f1_by_admission(rows, level=level, drug_map=drug_map)
    for row, f1 in zip(rows, scores, strict=True):
        seen = json.dumps([level, row.patient.as_json(), row.diagnoses, row.truth])
        twins[seen] += 1
        key = f"{seen} {twins[seen]}"
        found[key], clusters[key] = f1, row.cluster
    decides: dict[str, object] = {
        "data (source)": summary.source or "–",
        "data (samples, sha256)": (run.inputs().samples or "–")[:12],
        "backbone (sha256)": summary.backbone.fingerprint[:12] if summary.backbone else "–",
        "way of training": "single node" if summary.mode == "single" else "federation",
    }
    places = (*PLACES, *file_keys())
    if summary.source != SYNTHETIC:
        places = (*places, "data.synthetic-patients")
    keys = {k: v for k, v in flatten(config).items() if not k.startswith(places)}
    return Compared(
        run=run, summary=summary, settings=decides | keys, f1_by_case=found, clusters=clusters
    )


def comparison_blocks(groups: Mapping[str, Sequence[Compared]]) -> list[Block]:
    """Return paired differences, what differs and curves; a group is a run, or an arm's runs."""
    return [*_paired(groups), *_what_differs(groups), *_curves(groups)]


def same_cases(groups: Mapping[str, Sequence[Compared]]) -> bool:
    """Tell whether all runs answered the very same test cases."""
    sets = {frozenset(one.f1_by_case) for runs in groups.values() for one in runs}
    return len(sets) == 1 and bool(next(iter(sets)))


def _notices(groups: Mapping[str, Sequence[Compared]]) -> list[Block]:
    terms = {handling_of(one.summary.source).report for runs in groups.values() for one in runs}
    personal = personal_note(one.summary for runs in groups.values() for one in runs)
    notices = [" ".join([NOTICE, *sorted(terms)]), *filter(None, [personal])]
    return [*(Block(note=note, warning=True) for note in notices), *_other_cases(groups)]


def _standing(groups: Mapping[str, Sequence[Compared]]) -> list[Block]:
    """Figures of single runs side by side: ranked where the cases are the same."""
    same = same_cases(groups)
    shown = {
        name: one.summary.metrics.get(stands_for(one.summary), Figures())
        for name, (one,) in groups.items()
    }
    order = sorted(shown, key=lambda name: -(shown[name].f1 or 0)) if same else list(shown)
    rows = []
    for name in order:
        summary, metrics = groups[name][0].summary, shown[name]
        rows.append(
            (
                name,
                number((summary.validation_loss or (None,))[-1]),
                *(figure(metrics, key) for key, _ in COLUMNS),
                megabytes(summary.wire.bytes_up if summary.wire else 0),
                number(float(summary.privacy.epsilon) if summary.privacy else None),
            )
        )
    headers = (
        *("run", "validation loss"),
        *(name for _, name in COLUMNS),
        *("sent up", "epsilon"),
    )
    bars = tuple(
        Bar(
            name=name,
            value=shown[name].f1,
            text=figure(shown[name], "f1"),
            interval=shown[name].interval("f1"),
        )
        for name in (order if same else ())
    )
    return [Block(title="Runs compared", headers=headers, rows=tuple(rows), bars=bars)]


def _other_cases(groups: Mapping[str, Sequence[Compared]]) -> list[Block]:
    if same_cases(groups):
        return []
    note = (
        "These were not scored on the same test cases: their figures stand beside each other in no "
        "order, and no difference can be drawn between them (see What differs)."
    )
    return [Block(note=note, warning=True)]


def _paired(groups: Mapping[str, Sequence[Compared]]) -> list[Block]:
    if len(groups) < 2 or not same_cases(groups):
        return []
    (reference, first), *others = groups.items()
    keys, clusters = list(first[0].f1_by_case), first[0].clusters
    values = {
        name: [statistics.fmean(one.f1_by_case[key] for one in runs) for key in keys]
        for name, runs in groups.items()
    }
    rows = []
    for name, _ in others:
        gains = [
            ours - theirs for ours, theirs in zip(values[name], values[reference], strict=True)
        ]
        patients = [clusters[key] for key in keys]
        found = interval_of_mean(gains, patients, resamples=RESAMPLES, seed=0, name="paired")
        interval = apart = "–"
        if found.low is not None and found.high is not None:
            interval = f"{found.low:+.3f} to {found.high:+.3f}"
            apart = "no" if found.low <= 0 <= found.high else "yes"
        rows.append((name, f"{found.value:+.3f}", interval, apart))
    note = (
        f"F1 of the same {len(keys)} cases of {len(set(clusters.values()))} patients, case by "
        f"case, against {reference}; 95% bootstrap intervals over patients"
        + (", of the mean over an arm's runs." if any(len(r) > 1 for r in groups.values()) else ".")
    )
    headers = ("", f"F1 minus that of {reference}", "95% interval", "apart")
    return [Block(title="Paired differences", note=note, headers=headers, rows=tuple(rows))]


def _curves(groups: Mapping[str, Sequence[Compared]]) -> list[Block]:
    plots, silent = [], set(groups)
    for metric, label in (("validation-loss", "validation loss"), ("train-loss", "training loss")):
        lines: dict[str, Points] = {}
        units: set[str] = set()
        for name, runs in groups.items():
            values: dict[int, list[float]] = defaultdict(list)
            for one in runs:
                events = one.run.metrics(metric)
                whole = [event for event in events if event.hospital is None] or events
                for event in whole:
                    units.add(event.unit)
                    if event.number is not None:
                        values[event.place].append(event.number)
            if values:
                lines[name] = [(at, statistics.fmean(found)) for at, found in values.items()]
                silent.discard(name)
        if lines:
            axis = "round, or step of a single node" if len(units) > 1 else units.pop()
            plots.append(lines_svg(lines, x_label=axis, y_label=label))
    arms = ", and over the runs of an arm" if any(len(r) > 1 for r in groups.values()) else ""
    notes = [f"Means over hospitals{arms}."] if plots else []
    private = [
        name
        for name, runs in groups.items()
        if name in silent and any(one.summary.privacy for one in runs)
    ]
    if private:
        notes.append(f"Without a curve, for with privacy no loss is told: {', '.join(private)}.")
    return [Block(title="Learning curves", note=" ".join(notes), svgs=tuple(plots))] * bool(notes)


def _what_differs(groups: Mapping[str, Sequence[Compared]]) -> list[Block]:
    def shown(runs: Sequence[Compared], key: str) -> str:
        return ", ".join(dict.fromkeys(setting(one.settings.get(key, "–")) for one in runs))

    sets = dict.fromkeys(frozenset(one.f1_by_case) for runs in groups.values() for one in runs)
    letters = {cases: f"{len(cases)} cases, set {n}" for n, cases in enumerate(sets, 1)}
    cases = [
        ", ".join(dict.fromkeys(letters[frozenset(one.f1_by_case)] for one in runs))
        for runs in groups.values()
    ]
    keys = dict.fromkeys(key for runs in groups.values() for one in runs for key in one.settings)
    table = [("test cases", *cases)]
    table += [(key, *(shown(runs, key) for runs in groups.values())) for key in keys]
    rows = tuple(row for row in table if len(set(row[1:])) > 1)
    alike = "" if rows else "Nothing that decides a result: these runs have equal settings."
    headers = ("key", *groups)
    return [Block(title="What differs", note=alike, headers=headers, rows=rows, text_cells=True)]


def _names(runs: Sequence[RunDirectory]) -> list[str]:
    """Name runs by their folders; equal names get a number."""
    names: list[str] = []
    for run in runs:
        before = [name.partition(" (")[0] for name in names].count(run.path.name)
        names.append(f"{run.path.name} ({before + 1})" if before else run.path.name)
    return names


def _read(file: Path) -> object:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
