"""All drugs of a formulary ranked for an admission, cut into a list, with a confidence for each.

A hospital ranks its own formulary and cuts where its own validation patients say: neither names nor
scores of another hospital are needed.

    ranker = Ranker(session, formulary_of(hospital.train), text=config.text, max_length_tokens=2048)
    cutoff = ranker.fit(hospital.validation, samples=64, seed=0)
    (ranking,) = ranker.rank([prompt], cutoff)
    [(drug.name, drug.confidence) for drug in ranking.listed], ranking.ends

Shapes: N names of the formulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.config import TextConfig
from common.data.names import normalise_string
from common.data.protocols import not_ordered
from common.evaluation.cutoff import Cutoff, Frequencies, fit_cutoff
from common.evaluation.drug_scores import ScorePlan, drug_scores, score_plan
from common.evaluation.drug_trie import DrugTrie, FormularyMatcher, drug_trie
from common.evaluation.formulary import Formulary
from common.seeds import stream
from common.text.batches import encode_prompt

if TYPE_CHECKING:
    from common.data.samples import Admission
    from common.model.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedDrug:
    """One drug of a formulary, for one admission."""

    name: str
    confidence: float
    """Recalibrated probability that it is in the admission's list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """A formulary for one admission, the likeliest drug first."""

    drugs: tuple[RankedDrug, ...]
    length: int
    """How many of them are the list."""
    threshold: float | None
    """Confidence at which the list ends; None: at a length."""
    admissions: int
    """Validation admissions that the threshold was chosen on."""

    @property
    def listed(self) -> tuple[RankedDrug, ...]:
        """The drugs of the list."""
        return self.drugs[: self.length]

    def beyond(self, admission: "Admission") -> "Ranking":
        """Return the ranking without the drugs that are known to be ordered already.

        A list that ends at a length keeps it, one that ends at a threshold what reaches it.
        """
        open_names = set(not_ordered(tuple(drug.name for drug in self.drugs), admission))
        kept = [drug.name in open_names for drug in self.drugs]
        drugs = tuple(drug for drug, stays in zip(self.drugs, kept, strict=True) if stays)
        above = self.length if self.threshold is None else sum(kept[: self.length])
        return replace(self, drugs=drugs, length=min(above, len(drugs)))

    @property
    def ends(self) -> str:
        """Why the list ends where it does, in a sentence."""
        if self.threshold is None:
            return f"it is as long as training lists are on average, {self.length} drugs"
        chosen = (
            f"the threshold of {self.threshold:.0%} that served {self.admissions} validation "
            "admissions best"
        )
        if self.length == len(self.drugs):
            return f"every drug of the formulary reaches {chosen}"
        following = self.drugs[self.length]
        if self.drugs[0].confidence < self.threshold:
            return f"no drug reaches {chosen}; the likeliest one is shown"
        return f"the next drug, {following.name}, has {following.confidence:.0%}, below {chosen}"


class Ranker:
    """One formulary on one session: its trie is built once, and serves every adapter.

    Args:
        session: Backbone and adapter; the adapter as it is when a method is called counts.
        formulary: What may be listed.
        text: What the run asks.
        max_length_tokens: ``train.max-length``, which prompts keep to.
        frequencies: Of the training split, where confidences are to know them.

    Raises:
        UserError: If the tokenizer does not write lists line by line.
    """

    def __init__(
        self,
        session: "Session",
        formulary: Formulary,
        *,
        text: TextConfig,
        max_length_tokens: int,
        frequencies: Frequencies | None = None,
    ) -> None:
        self.session, self.formulary, self._frequencies = session, formulary, frequencies
        self._text, self._max_length_tokens = text, max_length_tokens
        self._place = {normalise_string(name): i for i, name in enumerate(formulary)}

    @cached_property
    def trie(self) -> DrugTrie:
        """The formulary's names as tokens."""
        return drug_trie(self.formulary, self.session.tokenizer)

    @cached_property
    def plan(self) -> ScorePlan:
        """What is run to score them."""
        return score_plan(self.trie)

    @property
    def tokens(self) -> int:
        """Tokens that scoring runs beyond a prompt."""
        return len(self.trie.header) + sum(len(one.tokens) for one in self.plan.passes)

    def matcher(self) -> FormularyMatcher:
        """Return what holds one generated answer to the formulary."""
        return FormularyMatcher(self.trie)

    def place(self, name: str) -> int | None:
        """Return where a name stands in the formulary, compared at the string level."""
        return self._place.get(normalise_string(name))

    def scores(self, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
        """Return the raw scores [N] of every prompt, see ``common.evaluation.drug_scores``."""
        return drug_scores(self.session, prompts, lambda _: self.plan)

    def fit(self, validation: Sequence["Admission"], *, samples: int, seed: int) -> Cutoff:
        """Choose threshold and recalibration for the present adapter.

        Args:
            validation: Validation admissions; never held-out ones.
            samples: How many are used, seeded choice; 0: all.
            seed: Of the choice.

        Raises:
            UserError: If there are none.
        """
        order = stream(seed, "threshold-samples").permutation(len(validation))
        chosen = [validation[place] for place in sorted(order[: samples or None].tolist())]
        places = [{self.place(drug) for drug in one.drugs} for one in chosen]
        prompts = [
            encode_prompt(
                one,
                self.session.tokenizer,
                text=self._text,
                max_length_tokens=self._max_length_tokens,
            )[0]
            for one in chosen
        ]
        return fit_cutoff(
            self.scores(prompts),
            [[name in found for name in range(len(self.formulary))] for found in places],
            [sum(self.place(drug) is None for drug in one.drugs) for one in chosen],
            self._frequencies,
            [self._open(one) for one in chosen],
        )

    def _open(self, admission: "Admission") -> list[bool]:
        """Tell of every name whether a list may have it: what is ordered already may not."""
        left = set(not_ordered(self.formulary, admission))
        return [name in left for name in self.formulary]

    def rank(self, prompts: Sequence[Sequence[int]], cutoff: Cutoff) -> list[Ranking]:
        """Rank the formulary after each prompt."""
        return [self.ranking(one, cutoff) for one in self.scores(prompts)]

    def ranking(self, scores_N: NDArray[np.float64], cutoff: Cutoff) -> Ranking:
        """Return the ranking that raw scores stand for."""
        confidence_N = cutoff.confidence(scores_N)
        return Ranking(
            drugs=tuple(
                RankedDrug(name=self.formulary[place], confidence=float(confidence_N[place]))
                for place in cutoff.order(scores_N)
            ),
            length=len(cutoff.chosen(scores_N)),
            threshold=None
            if cutoff.threshold is None
            else float(cutoff.confidence(np.array([cutoff.threshold]))[0]),
            admissions=cutoff.admissions,
        )
