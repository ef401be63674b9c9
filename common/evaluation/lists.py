"""How a list comes about: written, freely or held to a grammar or formulary, or scored.

Every hospital answers with its own formulary, and cuts scored lists where its own validation
patients say (``common.evaluation.ranking``).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from common.config import Config
from common.data.protocols import not_ordered
from common.evaluation.answers_file import CutoffFacts, Generation
from common.evaluation.constrained import answer_grammar
from common.evaluation.cutoff import Cutoff, require_validation
from common.evaluation.drug_scores import drug_scores
from common.evaluation.drug_trie import require_room
from common.evaluation.formulary import formularies, frequencies_of
from common.evaluation.generate import generate
from common.evaluation.ranking import Ranker, Ranking
from common.evaluation.slot_generation import Generated, Matcher
from common.files import writable
from common.text.prompts import parse_answer

if TYPE_CHECKING:
    from common.data.partition import Hospital
    from common.data.samples import Admission
    from common.model.session import Session

Progress = Callable[[int, int], None]
Hospitals = TypeVar("Hospitals", int, str)


class Answer(NamedTuple):
    """One answer to one case."""

    text: str | None
    """What the model wrote; None of a baseline, and of a scored list."""
    drugs: tuple[str, ...] | None
    """None: the text is not in the format."""
    escaped: int = 0
    """Names that UTF-8 cannot hold."""
    order: tuple[str, ...] | None = None
    """Of a ranking: all names, the likeliest first."""
    ranking: Ranking | None = None
    """Of a scored list: with confidences."""

    def beyond(self, admission: "Admission") -> "Answer":
        """Return the answer without the drugs that are known to be ordered already."""
        if not admission.ordered:
            return self
        return self._replace(
            drugs=None if self.drugs is None else not_ordered(self.drugs, admission),
            order=None if self.order is None else not_ordered(self.order, admission),
            ranking=None if self.ranking is None else self.ranking.beyond(admission),
        )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is asked, and of which hospital."""

    ids: Sequence[Sequence[int]]
    hospitals: Sequence[int]
    """Place of each prompt's hospital."""

    def at(self, places: Sequence[int]) -> "Prompts":
        """Return some of them."""
        return Prompts(
            ids=[self.ids[place] for place in places],
            hospitals=[self.hospitals[place] for place in places],
        )


def places_of(hospitals: Sequence[Hospitals]) -> dict[Hospitals, list[int]]:
    """Return each hospital's places in a list, by hospital.

    >>> places_of([2, 0, 2])
    {0: [1], 2: [0, 2]}
    """
    return {
        one: [place for place, at in enumerate(hospitals) if at == one]
        for one in sorted(set(hospitals))
    }


class ListMaker:
    """Answers prompts in the way that the configuration names; made once for all adapters.

    Args:
        session: Backbone and adapter; the adapter as it is when ``answer`` is called counts.
        hospitals: Their training splits are the formularies, their validation splits choose the
            thresholds.
        config: Sections ``evaluation`` and ``train.max_length`` are read.

    Raises:
        UserError: If what it names cannot be had: the grammar's package, a formulary, its file.
    """

    def __init__(self, session: "Session", hospitals: Sequence["Hospital"], config: Config) -> None:
        self.session, self.hospitals = session, hospitals
        self._settings = config.evaluation
        self._rankers: list[Ranker] = []
        trains = [hospital.train for hospital in hospitals]
        if self._settings.method == "score" or self._settings.decoding == "formulary":
            self._rankers = [
                Ranker(
                    session,
                    one,
                    text=config.text,
                    max_length_tokens=config.train.max_length,
                    frequencies=frequencies_of(one, train) if self._settings.frequencies else None,
                )
                for one, train in zip(
                    formularies(trains, self._settings.formulary), trains, strict=True
                )
            ]

    def answer(
        self, prompts: Prompts, *, progress: Progress | None = None
    ) -> tuple[list[Answer], Generation]:
        """Answer prompts with the session's present adapter.

        Args:
            prompts: Token ids and hospitals.
            progress: Called with (answers so far, all answers).

        Raises:
            UserError: If a hospital has no validation patients to choose a threshold on, or a
                name does not fit into ``evaluation.max-new-tokens``.
        """
        started = time.perf_counter()
        scored = self._settings.method == "score"
        answers, facts = (self._scored if scored else self._written)(prompts, progress)
        return answers, facts.model_copy(
            update={"seconds": round(time.perf_counter() - started, 3)}
        )

    def cutoffs(self, hospitals: Sequence[int]) -> dict[int, Cutoff]:
        """Choose where these hospitals cut, for the present adapter."""
        settings = self._settings
        return {
            place: self._rankers[place].fit(
                self.hospitals[place].validation,
                samples=settings.threshold_samples,
                seed=settings.seed,
            )
            for place in sorted(set(hospitals))
        }

    def _scored(
        self, prompts: Prompts, progress: Progress | None
    ) -> tuple[list[Answer], Generation]:
        cutoffs = self.cutoffs(prompts.hospitals)
        rankers = [self._rankers[place] for place in prompts.hospitals]
        scores = drug_scores(
            self.session, prompts.ids, lambda prompt: rankers[prompt].plan, progress=progress
        )
        rankings = [
            ranker.ranking(one, cutoffs[place])
            for ranker, one, place in zip(rankers, scores, prompts.hospitals, strict=True)
        ]
        answers = [
            Answer(
                None,
                tuple(drug.name for drug in one.listed),
                order=tuple(drug.name for drug in one.drugs),
                ranking=one,
            )
            for one in rankings
        ]
        return answers, Generation(
            seconds=0,
            tokens=sum(map(len, prompts.ids)) + sum(ranker.tokens for ranker in rankers),
            cut_answers=0,
            cutoffs={
                self.hospitals[place].name: CutoffFacts(
                    names=len(self._rankers[place].formulary),
                    threshold=one.threshold,
                    slope=one.slope,
                    weight=one.weight if one.frequencies else None,
                    length=one.frequencies.length if one.frequencies else None,
                    intercept=one.intercept,
                    admissions=one.admissions,
                    f1=one.f1,
                )
                for place, one in cutoffs.items()
            },
        )

    def _written(
        self, prompts: Prompts, progress: Progress | None
    ) -> tuple[list[Answer], Generation]:
        settings = self._settings
        generated = generate(
            self.session,
            prompts.ids,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            matcher=self._matcher(prompts.hospitals),
            progress=progress,
        )
        answers = [_read(self.session, one) for one in generated]
        return answers, Generation(
            seconds=0,
            tokens=sum(len(one.tokens) for one in generated),
            cut_answers=sum(not one.finished for one in generated),
            escaped_names=sum(one.escaped for one in answers),
        )

    def _matcher(self, hospitals: Sequence[int]) -> Callable[[int], Matcher] | None:
        if self._settings.decoding == "grammar":
            return answer_grammar(self.session)
        if self._settings.decoding == "greedy":
            return None
        used: Mapping[int, Ranker] = {place: self._rankers[place] for place in set(hospitals)}
        for ranker in used.values():
            require_room(ranker.trie, self._settings.max_new_tokens)
        return lambda prompt: used[hospitals[prompt]].matcher()


def check_lists(hospitals: Sequence["Hospital"], config: Config) -> None:
    """Check before anything is trained that held-out patients can be answered as asked for.

    Raises:
        UserError: If scored lists are asked for where nobody can choose their threshold.
    """
    if config.evaluation.method == "score":
        for hospital in hospitals:
            if hospital.test:
                require_validation(hospital.validation, hospital.name)


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


def _read(session: "Session", answer: Generated) -> Answer:
    text = str(session.tokenizer.decode(list(answer.tokens), skip_special_tokens=True))
    drugs, escaped = _drugs(text, finished=answer.finished)
    return Answer(text, None if drugs is None else tuple(drugs), escaped)
