"""``fedrx review make`` and ``fedrx review import``."""

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from common.evaluation.answers_file import Prediction, read_answers
from common.evaluation.judge.gate import source_of_run
from common.evaluation.judge.questions import read_judgements
from common.evaluation.review.packet import (
    ORDERED,
    Key,
    Packet,
    Shown,
    make_packet,
    packet_folder,
)
from common.evaluation.review.packet_import import (
    Review,
    check_against_packet,
    read_review,
    refuse_twins,
)
from common.evaluation.review.scores import summarise_reviews
from common.files import utf8, write_json, write_text
from common.records.judged import Reviewed
from common.rundir import SUMMARY, RunDirectory
from sim.answers.judge import alpha, percent, require_diagnoses
from sim.pages.fill import render
from sim.report.terminal import table


def make_review(
    run: RunDirectory,
    *,
    models: Sequence[str] = (),
    cases: int = 0,
    seed: int = 0,
    include_ordered: bool = False,
    out: Path | None = None,
) -> Path:
    """Write the packet's page and, into the run directory, its key.

    Args:
        run: A run with predictions.jsonl.
        models: Whose lists are shown; empty for all.
        cases: How many cases; 0 for all.
        seed: Of the choice of cases and of the lists' order.
        include_ordered: Show the true list among the others, as a control.
        out: The page; default inside the run directory.

    Returns:
        The page.

    Raises:
        UserError: See ``make_packet`` and ``require_diagnoses``.
    """
    require_diagnoses(run)
    packet = make_packet(
        read_answers(run),
        source=source_of_run(run),
        models=models,
        cases=cases,
        seed=seed,
        include_ordered=include_ordered,
    )
    folder = run.path / packet_folder(packet.sha256)
    write_json(folder / "key.json", packet.key.as_json())
    write_json(folder / "packet.json", packet.shown.as_json())
    page = out or folder / "review.html"
    try:
        write_text(page, render_review(packet))
    except OSError as error:
        raise UserError(f"{page}: {error.strerror}", fix="name another --out") from None
    return page


def render_review(packet: Packet) -> str:
    """Return the page: it shows the packet, and knows nothing of the key."""
    return render("review", data={"sha256": packet.sha256, "shown": packet.shown.as_json()})


def import_reviews(run: RunDirectory, files: Sequence[Path]) -> Reviewed:
    """Check downloaded reviews, keep them with the run, and score all of the packet's reviews.

    A reviewer's newer file replaces the older one.

    Args:
        run: The run that the packet was made from.
        files: All of one packet.

    Returns:
        The ``review`` part of summary.json.

    Raises:
        UserError: For a file that is damaged, of another packet, not a review, or the work of
            somebody who is there under another name; nothing is imported then.
    """
    read = [(file, read_review(file)) for file in files]
    packets = {review.packet for _, review in read}
    if len(packets) != 1:
        raise UserError(
            f"these files are of {len(packets)} packets",
            allowed="files of one packet",
            fix="import one packet's reviews at a time",
        )
    packet = _packet(run, packets.pop())
    predictions = read_answers(run)
    _require_same_predictions(packet, predictions)
    for file, review in read:
        check_against_packet(review, packet.shown, name=file.name)
    names = {review.reviewer.casefold() for _, review in read}
    if len(names) < len(read):
        raise UserError(
            "two of these files are by the same reviewer",
            fix="import the newer one, or give the reviewers different names",
        )
    folder = run.path / packet_folder(packet.sha256) / "reviews"
    kept = {
        file.name: Review.read(file.read_bytes(), what=str(file)) for file in folder.glob("*.json")
    }
    new = {f"{_slug(review.reviewer)}.json": review for _, review in read}
    reviews = [review for _, review in sorted({**kept, **new}.items())]
    refuse_twins(reviews)
    for name, review in new.items():
        write_json(folder / name, review.as_json())
    result = summarise_reviews(
        packet, reviews, predictions, read_judgements(run), run.config().data
    )
    run.write_json(SUMMARY, run.summary().having(review=result))
    return result


def _packet(run: RunDirectory, sha256: str) -> Packet:
    folder = run.path / packet_folder(sha256)
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not (folder / "key.json").is_file():
        made = ", ".join(sorted(p.name for p in (run.path / "review").glob("*/")))
        raise UserError(
            f"this review is of another packet than those made from {run.path}",
            allowed=made or "none made",
            fix="name the run whose `fedrx review make` wrote the page",
        )
    shown = Shown.read((folder / "packet.json").read_bytes(), what=str(folder / "packet.json"))
    key = Key.read((folder / "key.json").read_bytes(), what=str(folder / "key.json"))
    if not shown.sha256 == key.sha256 == sha256:
        raise UserError(
            f"{folder / 'packet.json'} was changed after the packet was made",
            fix="restore it, or make a new packet",
        )
    return Packet(shown=shown, key=key)


def _require_same_predictions(packet: Packet, predictions: Sequence[Prediction]) -> None:
    """Build the packet anew: another one means that the run was evaluated again since."""
    key = packet.key
    with contextlib.suppress(UserError):
        again = make_packet(
            predictions,
            source=packet.shown.source,
            models=[model for model in key.models if model != ORDERED],
            cases=len(key.cases),
            seed=key.seed,
            include_ordered=ORDERED in key.models,
        )
        if again.sha256 == packet.sha256:
            return
    raise UserError(
        "the run's predictions are not those that the packet shows",
        fix="make a new packet, or restore predictions.jsonl",
    )


def _slug(reviewer: str) -> str:
    """A file name that differs whenever the reviewers do, beyond case."""
    name = reviewer.casefold()
    words = re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:40]
    return f"{words}-{hashlib.sha256(utf8(name)).hexdigest()[:8]}"


def review_parts(result: Reviewed) -> list[object]:
    """Return the scores by model, and how far reviewers agree, with each other and the judge."""
    reviewers = len(result.reviewers)
    shown = table(
        (
            *("list by", "in format", "similarity", "after review"),
            *("kept", "overall 1-5", "lists reviewed"),
        ),
        [
            (
                *(model, percent(one.format_followed), _jaccard(one.similarity)),
                *(_jaccard(one.similarity_after_review), percent(one.kept_share)),
                *("-" if one.overall is None else f"{one.overall:.1f}", str(one.lists_reviewed)),
            )
            for model, one in result.models.items()
        ],
        words=1,
        title=f"{reviewers} reviewer{'s' * (reviewers != 1)}, {result.cases} cases "
        f"(names equal at level {result.level})",
    )
    lines = []
    if escaped := result.escaped_texts:
        lines.append(f"{escaped} texts could not be written as UTF-8, and are escaped")
    agreement, judge = result.agreement, result.judge
    if agreement.drugs:
        lines.append(
            f"reviewers on {agreement.drugs} drugs: unanimous {percent(agreement.unanimous)}, "
            f"alpha {alpha(agreement.alpha_drugs)} (overall marks {alpha(agreement.alpha_overall)})"
        )
    if judge and judge.drugs:
        lines.append(
            f"reviewers and judge on {judge.drugs} drugs: agree {percent(judge.agree)}, "
            f"alpha {alpha(judge.alpha)}"
        )
    return [shown, *lines]


def _jaccard(similarity: Mapping[str, float | None] | None) -> str:
    return percent((similarity or {}).get("jaccard"))
