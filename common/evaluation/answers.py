"""Answers on held-out patients, their metrics, and the baselines beside them.

What is fitted - the baselines' counts, the vocabulary - is fitted on training splits alone, and a
hospital's baselines on its own: no hospital's data helps another's baseline.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.data.names import read_drug_map
from common.data.partition import Hospital
from common.data.samples import Admission
from common.errors import UserError
from common.evaluation.baselines import BASELINES
from common.evaluation.constrained import answer_grammar
from common.evaluation.generate import Generated, generate
from common.evaluation.metrics import Prediction, score
from common.files import writable
from common.model.session import Session
from common.seeds import stream
from common.text.batches import encode_prompt
from common.text.prompts import age_text, parse_answer

B = Mapping[str, NDArray[np.float32]]
Progress = Callable[[str, int, int], None]
"""Called with (model, answers so far, all answers)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One held-out admission under an anonymous name."""

    name: str
    cluster: int
    """Number of the patient within this evaluation."""
    hospital: int
    admission: Admission


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, dict[str, Any]]
    """By model and baseline, plain JSON; see ``common.evaluation.metrics``."""
    predictions: list[dict[str, Any]]
    """Rows of predictions.jsonl; no ids, no dates."""
    facts: dict[str, Any]
    """How the answers came about: seconds, tokens, answers cut at the limit."""


def evaluate_answers(
    session: Session,
    hospitals: Sequence[Hospital],
    config: Config,
    adapters: Mapping[str, B | None],
    *,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer held-out admissions with every adapter and baseline, and score them.

    Args:
        session: Open session; its adapter's values are put back afterwards.
        hospitals: All of them; their test splits are answered.
        config: Sections ``evaluation``, ``train.max_length`` and ``data.normalisation`` are read.
        adapters: What to answer with, by the name in the results; None is the untrained backbone.
        progress: Called after every generated answer.

    Raises:
        UserError: If nothing is held out, or the constrained decoder is not there.
    """
    settings = config.evaluation
    cases = choose_cases(hospitals, samples=settings.samples, seed=settings.seed)
    prompts, dropped = _prompts(session, cases, config.train.max_length)
    matcher = answer_grammar(session) if settings.constrained else None
    answers: dict[str, list[tuple[str | None, tuple[str, ...] | None]]] = {}
    facts: dict[str, Any] = {
        "samples": len(cases),
        "constrained": settings.constrained,
        "settings": asdict(settings),
        "dropped_diagnoses": dropped,
        "generation": {},
    }
    before = session.adapter.flat.clone()
    try:
        for model, b in adapters.items():
            if b is None:
                # With B = 0 the update B A vanishes, whatever A is.
                session.adapter.flat.zero_()
            else:
                session.adapter.load(b)
            started = time.perf_counter()
            generated = generate(
                session,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                matcher=matcher,
                progress=_named(progress, model),
            )
            seconds = round(time.perf_counter() - started, 3)
            read = [_read(session, answer) for answer in generated]
            answers[model] = [(text, drugs) for text, drugs, _ in read]
            escaped = sum(count for _, _, count in read)
            facts["generation"][model] = {
                "seconds": seconds,
                "tokens": sum(len(answer.tokens) for answer in generated),
                "cut_answers": sum(not answer.finished for answer in generated),
                **({"escaped_names": escaped} if escaped else {}),
            }
    finally:
        session.adapter.flat.copy_(before)
    for name, lists in _baseline_lists(hospitals, cases).items():
        answers[name] = [(None, drugs) for drugs in lists]
    drug_map = (
        read_drug_map(Path(config.data.drug_map)) if config.data.normalisation == "map" else None
    )
    vocabulary = {drug for one in hospitals for sample in one.train for drug in sample.drugs}
    metrics = {
        model: score(
            [
                Prediction(
                    case=case.name, cluster=case.cluster, truth=case.admission.drugs, answer=answer
                )
                for case, (_, answer) in zip(cases, given, strict=True)
            ],
            level=config.data.normalisation,
            vocabulary=vocabulary,
            drug_map=drug_map,
            resamples=settings.bootstrap,
            seed=settings.seed,
        ).to_dict()
        for model, given in answers.items()
    }
    rows = [
        _row(case, model, text, answer)
        for place, case in enumerate(cases)
        for model, given in answers.items()
        for text, answer in (given[place],)
    ]
    return Evaluation(metrics=metrics, predictions=rows, facts=facts)


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


def read_answer(text: str, *, finished: bool) -> list[str] | None:
    r"""Parse a generated answer; what a token limit cut in its last line is left out.

    The first drug's line is kept even when cut, since there is nothing else to show.

    >>> read_answer("Drugs:\n- Aspirin\n- Insu", finished=False)
    ['Aspirin']
    >>> read_answer("Drugs:\n- Aspirin\n- Insu", finished=True)
    ['Aspirin', 'Insu']
    """
    return _drugs(text, finished=finished)[0]


def _drugs(text: str, *, finished: bool) -> tuple[list[str] | None, int]:
    """Read an answer; also count the names that UTF-8 cannot hold, which are escaped again."""
    if not finished:
        whole = text.rpartition("\n")[0]
        text = whole if "\n" in whole else text
    drugs: list[str] | None
    drugs, escaped = writable(parse_answer(text))
    return drugs, escaped


def _prompts(
    session: Session, cases: Sequence[Case], max_length: int
) -> tuple[list[list[int]], int]:
    encoded = [
        encode_prompt(case.admission, session.tokenizer, max_length_tokens=max_length)
        for case in cases
    ]
    return [ids for ids, _ in encoded], sum(dropped for _, dropped in encoded)


def _read(session: Session, answer: Generated) -> tuple[str, tuple[str, ...] | None, int]:
    text = str(session.tokenizer.decode(list(answer.tokens), skip_special_tokens=True))
    drugs, escaped = _drugs(text, finished=answer.finished)
    return text, None if drugs is None else tuple(drugs), escaped


def _baseline_lists(
    hospitals: Sequence[Hospital], cases: Sequence[Case]
) -> dict[str, list[tuple[str, ...]]]:
    lists: dict[str, list[tuple[str, ...]]] = {name: [()] * len(cases) for name in BASELINES}
    for number, hospital in enumerate(hospitals):
        places = [place for place, case in enumerate(cases) if case.hospital == number]
        asked = [cases[place].admission for place in places]
        for name, baseline in BASELINES.items():
            if asked:
                for place, drugs in zip(places, baseline(hospital.train, asked), strict=True):
                    lists[name][place] = drugs
    return lists


def _named(progress: Progress | None, model: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, of: progress(model, done, of)


def _row(
    case: Case, model: str, text: str | None, answer: tuple[str, ...] | None
) -> dict[str, Any]:
    one = case.admission
    return {
        "case": case.name,
        "cluster": case.cluster,
        "model": model,
        "patient": {
            "sex": one.sex,
            "age": age_text(one.age),
            "height_cm": one.height_cm,
            "weight_kg": one.weight_kg,
            "bmi": one.bmi,
        },
        "diagnoses": list(one.diagnoses),
        "truth": list(one.drugs),
        "text": text,
        "answer": None if answer is None else list(answer),
    }
