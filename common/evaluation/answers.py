"""Answers on held-out patients, their metrics, and the baselines beside them.

What is fitted - the baselines' counts, the vocabulary - is fitted on training splits alone, and a
hospital's baselines on its own: no hospital's data helps another's baseline.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.data.partition import Hospital
from common.data.samples import Admission
from common.errors import UserError
from common.evaluation.answers_file import Evaluation, Facts, Generation, Patient, Prediction, Way
from common.evaluation.baselines import BASELINES
from common.evaluation.figures import Compared, figures
from common.evaluation.lists import Answer, ListMaker, Prompts, places_of
from common.model.session import Session
from common.seeds import stream
from common.text.batches import encode_prompt
from common.text.known import LeftOut, together
from common.text.prompts import age_text

B = Mapping[str, NDArray[np.float32]]
Progress = Callable[[str, int, int], None]
"""Called with (model, answers so far, all answers)."""


@dataclass(frozen=True)
class Personal:
    """Every hospital answers with a B of its own."""

    by_hospital: Mapping[str, B]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One held-out admission under an anonymous name."""

    name: str
    cluster: int
    """Number of the patient within this evaluation."""
    hospital: int
    admission: Admission


def evaluate_answers(
    session: Session,
    hospitals: Sequence[Hospital],
    config: Config,
    adapters: Mapping[str, B | Personal | None],
    *,
    checkpoint: str = "",
    progress: Progress = lambda model, done, of: None,
) -> Evaluation:
    """Answer held-out admissions with every adapter and baseline, and score them.

    Args:
        session: Open session; its adapter's values are put back afterwards.
        hospitals: All of them; their test splits are answered.
        config: Sections ``evaluation`` and ``text``, ``train.max_length`` and
            ``data.normalisation`` are read.
        adapters: What to answer with, by the name in the results; None is the untrained backbone,
            ``Personal`` a B for each hospital's cases.
        checkpoint: The run's last one, which names the evaluation.
        progress: Called after every generated answer.

    Raises:
        UserError: If nothing is held out, or lists cannot be made as asked for, see
            ``common.evaluation.lists``.
    """
    settings = config.evaluation
    cases = choose_cases(hospitals, samples=settings.samples, seed=settings.seed)
    prompts, left_out = _prompts(cases, session, config)
    maker = ListMaker(session, hospitals, config)
    with session.adapter.restored():
        written = {
            model: _written(maker, adapter, cases, prompts, partial(progress, model))
            for model, adapter in adapters.items()
        }
    way = Way(checkpoint, settings, session.device.value, session.dtype.value)
    generation = {model: facts for model, (_, facts) in written.items()}
    answers = {model: given for model, (given, _) in written.items()}
    answers |= _baseline_answers(hospitals, cases)
    rows = {
        model: [_row(case, model, one) for case, one in zip(cases, given, strict=True)]
        for model, given in answers.items()
    }
    return Evaluation(
        facts=_facts(way, len(cases), left_out, generation),
        metrics=figures(rows, answers, Compared.of(hospitals, prompts.hospitals, config)),
        predictions=[row for of_case in zip(*rows.values(), strict=True) for row in of_case],
    )


def choose_cases(hospitals: Sequence[Hospital], *, samples: int, seed: int) -> list[Case]:
    """Choose held-out admissions of all hospitals, in an order that tells nothing.

    The choice depends on the admissions and the seed, not on how patients are dealt to
    hospitals, so that runs with other hospitals are compared on the same cases.

    Args:
        hospitals: Where the test splits are.
        samples: How many; 0 or more than there are: all.
        seed: Of the choice.

    Raises:
        UserError: If no hospital holds anything out.
    """
    held_out = sorted(
        ((admission, place) for place, one in enumerate(hospitals) for admission in one.test),
        key=lambda item: (item[0].patient, item[0].admission),
    )
    if not held_out:
        raise UserError(
            "no held-out patients to answer: every test split is empty",
            fix="raise data.test-fraction, or use more patients",
        )
    order = stream(seed, "evaluation-samples").permutation(len(held_out))[: samples or None]
    clusters: dict[int, int] = {}
    cases = []
    for number, place in enumerate(order.tolist(), start=1):
        admission, hospital = held_out[place]
        cluster = clusters.setdefault(admission.patient, len(clusters) + 1)
        cases.append(
            Case(name=f"case-{number:04d}", cluster=cluster, hospital=hospital, admission=admission)
        )
    return cases


def _prompts(cases: Sequence[Case], session: Session, config: Config) -> tuple[Prompts, LeftOut]:
    """Return what is asked, and what the prompts do not show for their length."""
    encoded = [
        encode_prompt(
            case.admission,
            session.tokenizer,
            text=config.text,
            max_length_tokens=config.train.max_length,
        )
        for case in cases
    ]
    prompts = Prompts(ids=[ids for ids, _ in encoded], hospitals=[case.hospital for case in cases])
    return prompts, together(left_out for _, left_out in encoded)


def _written(
    maker: ListMaker,
    adapter: B | Personal | None,
    cases: Sequence[Case],
    prompts: Prompts,
    progress: Callable[[int, int], None],
) -> tuple[list[Answer], Generation]:
    """Let each B of an adapter answer its share of the cases; return all answers in their order."""
    answers: dict[int, Answer] = {}
    whole = Generation(seconds=0, tokens=0, cut_answers=0)
    answered, asked = count(1), len(cases)
    for b, places in _shares(adapter, maker.hospitals, prompts):
        if b is None:
            # With B = 0 the update B A vanishes, whatever A is.
            maker.session.adapter.flat.zero_()
        else:
            maker.session.adapter.load(b)
        given, facts = maker.answer(
            prompts.at(places), progress=lambda _done, _of: progress(next(answered), asked)
        )
        answers |= zip(places, given, strict=True)
        whole = whole.and_(facts)
    return [answers[place].beyond(case.admission) for place, case in enumerate(cases)], whole


def _shares(
    adapter: B | Personal | None, hospitals: Sequence[Hospital], prompts: Prompts
) -> list[tuple[B | None, list[int]]]:
    """Return every B of an adapter, with the places of the prompts that it answers."""
    if not isinstance(adapter, Personal):
        return [(adapter, list(range(len(prompts.ids))))]
    return [
        (adapter.by_hospital[hospitals[number].name], places)
        for number, places in places_of(prompts.hospitals).items()
    ]


def _baseline_answers(
    hospitals: Sequence[Hospital], cases: Sequence[Case]
) -> dict[str, list[Answer]]:
    """Let every baseline answer; another one is added to ``BASELINES``."""
    answers: dict[str, dict[int, Answer]] = {name: {} for name in BASELINES}
    for number, places in places_of([case.hospital for case in cases]).items():
        asked = [cases[place].admission for place in places]
        for name, baseline in BASELINES.items():
            for place, found in zip(places, baseline(hospitals[number].train, asked), strict=True):
                answers[name][place] = Answer(None, found.listed, order=found.drugs)
    return {name: [given[place] for place in sorted(given)] for name, given in answers.items()}


def _row(case: Case, model: str, answer: Answer) -> Prediction:
    one = case.admission
    return Prediction(
        case=case.name,
        cluster=case.cluster,
        model=model,
        patient=Patient(
            sex=one.sex,
            age=age_text(one.age),
            height_cm=one.height_cm,
            weight_kg=one.weight_kg,
            bmi=one.bmi,
        ),
        diagnoses=one.diagnoses,
        truth=one.drugs,
        text=answer.text,
        answer=answer.drugs,
        confidence=None
        if answer.ranking is None
        else tuple(round(drug.confidence, 4) for drug in answer.ranking.listed),
    )


def _facts(way: Way, samples: int, left_out: LeftOut, generation: dict[str, Generation]) -> Facts:
    """Say how the answers came about."""
    return Facts(
        **way._asdict(),
        samples=samples,
        constrained=way.settings.method == "generate" and way.settings.decoding != "greedy",
        dropped_diagnoses=left_out.diagnoses,
        left_out=left_out.beyond_diagnoses() or None,
        generation=generation,
    )
