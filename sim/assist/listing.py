"""One patient's list, a confidence for each drug, and why the list ends.

The list is written or scored, as the run's configuration says; there are confidences where the
run's tables are on this machine.
The formulary is what all training hospitals at hand ordered, or the user's file; threshold and
recalibration come from their validation patients.
"""

from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.data.dataset import Dataset
from common.data.samples import Admission
from common.errors import UserError
from common.evaluation.constrained import answer_grammar
from common.evaluation.cutoff import Cutoff
from common.evaluation.drug_trie import require_room
from common.evaluation.formulary import Formulary, formulary_of, frequencies_of, read_formulary
from common.evaluation.generate import generate
from common.evaluation.judge.rubric import distinct_drugs
from common.evaluation.lists import read_answer
from common.evaluation.ranking import Ranker
from common.model.session import Session
from common.text.batches import encode_prompt


@dataclass(frozen=True, kw_only=True)
class ListedDrugs:
    """What the model lists for one patient."""

    names: tuple[str, ...] | None
    """None: the answer was no drug list."""
    confidences: tuple[float | None, ...] = ()
    """Of each name: the recalibrated probability that it is ordered; None where it is not known."""
    ends: str = ""
    """Why the list ends where it does."""
    dropped_diagnoses: int = 0


class Lister:
    """Makes one patient's list at a time.

    Args:
        session: Backbone with the run's adapter.
        config: Of the run.
        data: The run's, if it is on this machine.

    Raises:
        UserError: If the configuration asks for what this machine cannot give.
    """

    def __init__(self, session: Session, config: Config, data: Dataset | None) -> None:
        self._session, self._config = session, config
        settings = config.evaluation
        self._ranker: Ranker | None = None
        self._cutoff: Cutoff | None = None
        formulary = self._formulary(data)
        if formulary is not None:
            counted = settings.method == "score" and settings.frequencies
            self._ranker = Ranker(
                session,
                formulary,
                text=config.text,
                max_length_tokens=config.train.max_length,
                frequencies=frequencies_of(formulary, data.train) if data and counted else None,
            )
            validation = (
                [one for place in data.hospitals for one in place.validation] if data else []
            )
            if validation:
                self._cutoff = self._ranker.fit(
                    validation, samples=settings.threshold_samples, seed=settings.seed
                )
        if settings.method == "score" and self._cutoff is None:
            raise UserError(
                "evaluation.method=score needs the run's validation patients on this machine",
                fix="bring its tables, or --set evaluation.method=generate",
            )
        if settings.decoding == "formulary" and self._ranker is None:
            raise UserError(
                "evaluation.decoding=formulary needs the run's tables on this machine, or a file",
                fix="--set evaluation.formulary=FILE, or --set evaluation.decoding=greedy",
            )

    def list_drugs(self, admission: Admission) -> ListedDrugs:
        """Return one admission's list; deterministic."""
        ids, left_out = encode_prompt(
            admission,
            self._session.tokenizer,
            text=self._config.text,
            max_length_tokens=self._config.train.max_length,
        )
        if self._config.evaluation.method == "score":
            assert self._ranker is not None
            assert self._cutoff is not None
            (ranking,) = self._ranker.rank([ids], self._cutoff)
            return ListedDrugs(
                names=tuple(drug.name for drug in ranking.listed),
                confidences=tuple(drug.confidence for drug in ranking.listed),
                ends=ranking.ends,
                dropped_diagnoses=left_out.diagnoses,
            )
        text, finished = self._written(ids)
        answer = read_answer(text, finished=finished)
        names = None if answer is None else tuple(distinct_drugs(answer))
        limit = self._config.evaluation.max_new_tokens
        return ListedDrugs(
            names=names,
            confidences=self._confidences(ids, names or ()),
            ends="the model ended it"
            if finished
            else f"it was cut at {limit} tokens (evaluation.max-new-tokens)",
            dropped_diagnoses=left_out.diagnoses,
        )

    def _formulary(self, data: Dataset | None) -> Formulary | None:
        file = self._config.evaluation.formulary
        if file:
            return read_formulary(Path(file).expanduser())
        return formulary_of(data.train) if data and data.train else None

    def _written(self, ids: list[int]) -> tuple[str, bool]:
        settings, matcher = self._config.evaluation, None
        if settings.decoding == "grammar":
            matcher = answer_grammar(self._session)
        elif settings.decoding == "formulary":
            ranker = self._ranker
            assert ranker is not None
            require_room(ranker.trie, settings.max_new_tokens)
            matcher = lambda prompt: ranker.matcher()  # noqa: E731
        (answer,) = generate(
            self._session,
            [ids],
            max_new_tokens=settings.max_new_tokens,
            batch_size=1,
            matcher=matcher,
        )
        text = self._session.tokenizer.decode(list(answer.tokens), skip_special_tokens=True)
        return str(text), answer.finished

    def _confidences(self, ids: list[int], names: tuple[str, ...]) -> tuple[float | None, ...]:
        if self._ranker is None or self._cutoff is None or not names:
            return (None,) * len(names)
        (scores_N,) = self._ranker.scores([ids])
        confidence_N = self._cutoff.confidence(scores_N)
        places = [self._ranker.place(name) for name in names]
        return tuple(None if place is None else float(confidence_N[place]) for place in places)
