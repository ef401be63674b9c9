"""Answers on held-out patients, their metrics, and the baselines beside them.

What is fitted - the baselines' counts, the vocabulary - is fitted on training splits alone, and a
hospital's baselines on its own: no hospital's data helps another's baseline.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.data.partition import Hospital
from common.data.samples import Admission
from common.errors import UserError
from common.evaluation.answers_file import Evaluation, Facts, Generation, Patient, Prediction
from common.evaluation.baselines import BASELINES
from common.evaluation.figures import Compared, figures
from common.evaluation.lists import Answer, ListMaker, Prompts
from common.evaluation.metrics import drug_map_of, score
from common.model.session import Session
from common.seeds import stream
from common.text.batches import encode_prompt
from common.text.known import together
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
    progress: Progress | None = None,
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
    maker = ListMaker(session, hospitals, config)
    answers: dict[str, list[Answer]] = {}
    generation: dict[str, Generation] = {}
    before = session.adapter.flat.clone()
    try:
        for model, b in adapters.items():
            model_progress = None if progress is None else partial(progress, model)
            if isinstance(b, Personal):
                given, generation[model] = _personal_answers(session, maker, hospitals, prompts, b)
            else:
                if b is None:
                    # With B = 0 the update B A vanishes, whatever A is.
                    session.adapter.flat.zero_()
                else:
                    session.adapter.load(b)
                given, generation[model] = maker.answer(prompts, progress=model_progress)
            answers[model] = [
                one.beyond(case.admission) for one, case in zip(given, cases, strict=True)
            ]
    finally:
        session.adapter.flat.copy_(before)
    answers |= _baseline_answers(hospitals, cases)
    drug_map = drug_map_of(config.data)
    vocabulary = frozenset(
        drug for one in hospitals for sample in one.train for drug in sample.drugs
    )
    rows = {
        model: [_row(case, model, one) for case, one in zip(cases, given, strict=True)]
        for model, given in answers.items()
    }
    beside = figures(
        rows,
        answers,
        Compared(
            config=config,
            hospitals=[hospitals[case.hospital].name for case in cases],
            vocabulary=vocabulary,
        ),
    )
    return Evaluation(
        facts=Facts(
            samples=len(cases),
            constrained=settings.method == "generate" and settings.decoding != "greedy",
            settings=settings,
            dropped_diagnoses=sum(left_out.diagnoses for _, left_out in encoded),
            left_out=together(left_out for _, left_out in encoded).beyond_diagnoses() or None,
            generation=generation,
            checkpoint=checkpoint,
            device=session.device.value,
            dtype=session.dtype.value,
        ),
        metrics={
            model: score(
                of_model,
                level=config.data.normalisation,
                vocabulary=vocabulary,
                drug_map=drug_map,
                resamples=settings.bootstrap,
                seed=settings.seed,
            ).to_dict()
            | beside[model]
            for model, of_model in rows.items()
        },
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


def _personal_answers(
    session: Session,
    maker: ListMaker,
    hospitals: Sequence[Hospital],
    prompts: Prompts,
    personal: Personal,
) -> tuple[list[Answer], Generation]:
    """Let every hospital's own B answer its own prompts."""
    answers = [Answer(None, ())] * len(prompts.ids)
    whole = Generation(seconds=0, tokens=0, cut_answers=0)
    for number in sorted(set(prompts.hospitals)):
        places = [place for place, at in enumerate(prompts.hospitals) if at == number]
        session.adapter.load(personal.by_hospital[hospitals[number].name])
        own = Prompts(ids=[prompts.ids[p] for p in places], hospitals=[number] * len(places))
        given, facts = maker.answer(own)
        for place, one in zip(places, given, strict=True):
            answers[place] = one
        whole = whole.and_(facts)
    return answers, whole


def _baseline_answers(
    hospitals: Sequence[Hospital], cases: Sequence[Case]
) -> dict[str, list[Answer]]:
    """Let every baseline answer; another one is added to ``BASELINES``."""
    answers = {name: [Answer(None, ())] * len(cases) for name in BASELINES}
    for number, hospital in enumerate(hospitals):
        places = [place for place, case in enumerate(cases) if case.hospital == number]
        asked = [cases[place].admission for place in places]
        for name, baseline in BASELINES.items():
            for place, found in zip(
                places, baseline(hospital.train, asked) if asked else (), strict=True
            ):
                answers[name][place] = Answer(None, found.listed, order=found.drugs)
    return answers


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
