"""``fedrx evaluate``: answers of a run's adapter on held-out patients, with baselines beside."""

from collections.abc import Iterable, Mapping

from client.personal import own_b, with_own
from common.config import Config
from common.configio import changed_freely
from common.data.dataset import Dataset, open_hospitals
from common.evaluation.answers import B, Personal, choose_cases, evaluate_answers
from common.evaluation.answers_file import Evaluation, EvaluationStore, Facts, Way
from common.model.session import Session
from common.records.summary import Summary
from common.rundir import RunDirectory
from common.training.worker import Worker
from sim.answers.public_curve import public_curve
from sim.process.early import check_device
from sim.process.open_run import COMPUTING, require_same
from sim.process.progress import SILENT, Console, Meter
from sim.report.data_description import other_items

FREE_KEYS = ("evaluation.", *COMPUTING)


def evaluate_run(
    run: RunDirectory,
    *,
    checkpoint: str | None = None,
    overrides: Iterable[str] = (),
    console: Console = SILENT,
    worker: Worker | None = None,
    data: Dataset | None = None,
) -> Summary:
    """Answer held-out admissions with a run's B, the untrained backbone and the baselines.

    Writes predictions.jsonl, and ``metrics`` and ``evaluation`` in summary.json. There the last
    checkpoint is ``fedrx``; an earlier one stands beside it under its own name, for as long as
    the last is evaluated in the same way. A judgement of answers that are no longer there is
    taken out.

    Args:
        run: Any run directory with a checkpoint, federated or single.
        checkpoint: Name of a checkpoint; default the last.
        overrides: ``key=value``; only ``evaluation.*`` and where and how to compute.
        console: Where progress is shown.
        worker: Who may have the backbone open already.
        data: The run's, where it is open already.

    Returns:
        The content of summary.json.

    Raises:
        UserError: If an override would change what was trained, the data, the backbone or A are
            not those of the run, there is no such checkpoint, or nothing is held out.
    """
    config = changed_freely(run.config(), overrides, FREE_KEYS)
    check_device(config)
    loaded, last = run.load_checkpoint(checkpoint), run.load_checkpoint()
    data, session = reopen(run, config, worker or Worker(), data)
    store = EvaluationStore(run)
    if store.damage:
        console.say(f"{store.damage}: all is answered anew", style="yellow")
    way = Way(last.name, config.evaluation, session.device.value, session.dtype.value)
    if former := store.replaced_by(way):
        console.say(
            f"replaces the answers to {former.samples} admissions (method "
            f"{former.settings.method}, checkpoint {former.checkpoint}), their figures and report",
            style="yellow",
        )
    adapters: dict[str, B | Personal | None] = {}
    if loaded.name == last.name or not store.get(way):
        adapters = {"fedrx": last.b, "untrained": None}
        if own := personal_b(run, last.b, [one.name for one in data.hospitals]):
            adapters["personal"] = own
    if loaded.name != last.name:
        adapters[loaded.name] = loaded.b
    found = _answered(session, data, config, adapters, last.name, console)
    summary = run.summary()
    if config.evaluation.public_validation:
        curve = public_curve(run, session, config, console=console)
        summary = summary.having(public_validation=curve)
    # A run that plain `flwr run` made does not know its source yet.
    made = store.put(found, summary.having(source=summary.source or data.source))
    for line in _no_longer_shown(summary, made):
        console.say(line, style="yellow")
    return made


def _answered(
    session: Session,
    data: Dataset,
    config: Config,
    adapters: Mapping[str, B | Personal | None],
    checkpoint: str,
    console: Console,
) -> Evaluation:
    """Answer with progress shown, and say how it went."""
    settings, places = config.evaluation, {model: place for place, model in enumerate(adapters)}
    cases = len(choose_cases(data.hospitals, samples=settings.samples, seed=settings.seed))
    with Meter(console, "answers", cases * len(adapters)) as meter:
        found = evaluate_answers(
            session,
            data.hospitals,
            config,
            adapters,
            checkpoint=checkpoint,
            progress=lambda model, done, of: meter.update(places[model] * of + done, model),
        )
    _say(console, found.facts)
    return found


def personal_b(run: RunDirectory, b: B, hospitals: Iterable[str]) -> Personal | None:
    """Return B_global + B_own of every hospital, as this machine has them; None if it has none.

    One that was never asked has no own B, and answers with the global one.
    """
    own = {name: own_b(run.path / "hospitals" / name) for name in hospitals}
    if not any(own.values()):
        return None
    return Personal({name: with_own(b, one) for name, one in own.items()})


def reopen(
    run: RunDirectory, config: Config, worker: Worker, data: Dataset | None = None
) -> tuple[Dataset, Session]:
    """Return a run's data and a session, as they were when it was trained.

    Args:
        run: The run's directory.
        config: Its configuration, or one that differs in what cannot change them.
        worker: Opens the session.
        data: The run's, where it is open already.

    Raises:
        UserError: if the data, the backbone or A are not those of the run.
    """
    inputs = run.inputs()
    data = data or open_hospitals(config)
    # With other data, held-out patients could be ones that were trained on.
    require_same("the data", data.digest, inputs.samples, "data.path")
    session = worker.session(config)
    require_same("the backbone", session.spec.fingerprint, inputs.backbone, "model.backbone")
    require_same("A", session.adapter.a_fingerprint, inputs.a, "adapter.seed")
    return data, session


def _no_longer_shown(before: Summary, after: Summary) -> list[str]:
    """Say where judgements and reviews of answers that are gone still lie."""
    lines = []
    if before.judge and not after.judge:
        lines.append(
            "judgements of lists that are gone are not shown: judge.jsonl keeps them until `fedrx "
            "judge` writes it anew, judge/exchanges.jsonl every reply (a list that comes back "
            "costs nothing)"
        )
    if before.review and not after.review:
        lines.append("reviews of lists that are gone are not shown: review/ keeps them")
    return lines


def _say(console: Console, facts: Facts) -> None:
    for model, one in facts.generation.items():
        cut = f", {one.cut_answers} cut at evaluation.max-new-tokens" * bool(one.cut_answers)
        what = f"answers scored over {one.tokens:,}" if one.cutoffs else f"answers, {one.tokens}"
        took = f"{facts.samples} {what} tokens in {one.seconds:.1f} s"
        console.say(f"{model}: {took}{cut}", style="dim")
    left_out = {"diagnoses": facts.dropped_diagnoses, **other_items(facts.left_out or {})}
    for kind, number in left_out.items():
        if number:
            console.say(f"{number} {kind} left out of prompts (train.max-length)")
