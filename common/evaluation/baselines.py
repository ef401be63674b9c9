"""The simple baselines that always stand beside a model: popularity, neighbours, regression.

All are fitted on the training admissions alone and know nothing of a test admission but what its
prompt shows beside age, sex and measures (``common.data.protocols.known_items``): its coded
diagnoses, and under other protocols what they show. A drug that is known to be ordered already is
in no list. Names are counted at the string level and shown in their most common spelling. A list's
length is never looked up in the truth: popularity chooses it on the training split, neighbours use
the mean length of the neighbours' lists, regression the mean length in training.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.data.names import normalise_string
from common.data.protocols import known_items, not_ordered
from common.data.samples import Admission
from common.evaluation.formulary import formulary_of

if TYPE_CHECKING:
    from scipy.sparse import csr_array

DrugList = tuple[str, ...]

_LONGEST_POPULAR_LIST = 100
_ROWS_AT_ONCE = 256
_RAREST_REGRESSED = 5
_INVERSE_PENALTY = 0.1
"""scikit-learn's C."""
_MOST_FITTED_SAMPLES = 20_000


class Ranked(NamedTuple):
    """All drugs of the training split for one admission, and how many of them are its list."""

    drugs: DrugList
    """The likeliest first."""
    length: int

    @property
    def listed(self) -> DrugList:
        """The list."""
        return self.drugs[: self.length]


def popularity(train: Sequence[Admission], test: Sequence[Admission]) -> list[Ranked]:
    """Give everyone the most common drugs of the training split.

    As many, what is ordered already included, as have the best mean Jaccard there.
    """
    fit = _Fit.of(train)
    ranked_d = _ranked(fit.frequency_d)
    popular, length = fit.named(ranked_d), _best_length(fit, ranked_d)
    return [
        Ranked(not_ordered(popular, one), len(not_ordered(popular[:length], one))) for one in test
    ]


def nearest_neighbours(
    train: Sequence[Admission], test: Sequence[Admission], *, neighbours: int = 10
) -> list[Ranked]:
    """Let the training admissions with the most similar diagnoses vote.

    Similarity is the cosine of the sets of (version, code), and the weight of a vote. The drugs
    with the most votes fill a list as long as the neighbours' lists are on average (weighted).
    Ties go to earlier training admissions, and to the alphabet among drugs. Who shares no code
    with the training split gets the votes of all of it.
    """
    fit = _Fit.of(train)
    neighbours = min(neighbours, len(train))
    norms_n = np.sqrt(np.maximum(fit.codes_nc.sum(axis=1), 1))
    lengths_n = fit.drugs_nd.sum(axis=1)
    lists = []
    for start in range(0, len(test), _ROWS_AT_ONCE):
        asked = test[start : start + _ROWS_AT_ONCE]
        shared_bn = (fit.codes_of(asked) @ fit.codes_nc.T).toarray()
        for one, shared_n in zip(asked, shared_bn, strict=True):
            # The test admission's own norm is the same for all its neighbours: it changes nothing.
            weight_n = shared_n / norms_n
            near = largest(weight_n, neighbours)
            if not shared_n.any():
                weight_n, near = np.ones(len(train)), np.arange(len(train))
            votes_d = fit.drugs_nd[near].T @ weight_n[near]
            length = round(np.average(lengths_n[near], weights=weight_n[near]))
            lists.append(Ranked(not_ordered(fit.named(_ranked(votes_d)), one), length))
    return lists


def logistic_regression(train: Sequence[Admission], test: Sequence[Admission]) -> list[Ranked]:
    """Regress every drug on the diagnoses, and list the most probable ones.

    One L2-penalised regression a drug on the presence of each (version, code). The list is as
    long as the training lists are on average. Drugs with fewer than 5 training admissions keep
    their frequency; of more than 20,000 training admissions, 20,000 evenly spaced ones are used.
    """
    from sklearn.linear_model import LogisticRegression

    if not test:
        return []
    spaced = np.linspace(0, len(train) - 1, min(len(train), _MOST_FITTED_SAMPLES)).astype(int)
    fit = _Fit.of([train[row] for row in spaced])
    asked_bc = fit.codes_of(test)
    probable_bd = np.tile(fit.frequency_d, (len(test), 1))
    counts_d = fit.drugs_nd.sum(axis=0)
    for drug in np.flatnonzero((counts_d >= _RAREST_REGRESSED) & (counts_d < len(spaced))):
        model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=300)
        model.fit(fit.codes_nc, fit.drugs_nd[:, [drug]].toarray().ravel())
        probable_bd[:, drug] = model.predict_proba(asked_bc)[:, 1]
    length = round(fit.drugs_nd.sum() / len(spaced))
    return [
        Ranked(not_ordered(fit.named(_ranked(probable_d)), one), length)
        for one, probable_d in zip(test, probable_bd, strict=True)
    ]


BASELINES: Mapping[str, Callable[[Sequence[Admission], Sequence[Admission]], list[Ranked]]] = {
    "popularity": popularity,
    "nearest_neighbours": nearest_neighbours,
    "logistic_regression": logistic_regression,
}
"""Every baseline with its defaults, by the name it has in summary.json."""


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """Training admissions as 0/1 matrices (N admissions, C codes or other items, D drugs)."""

    codes_nc: "csr_array"
    drugs_nd: "csr_array"
    ordered_nd: "csr_array"
    """Known to be ordered already."""
    code_column: Mapping[str, int]
    spellings: tuple[str, ...]
    """The most common spelling of each drug; drugs are sorted by string-level name."""

    @classmethod
    def of(cls, train: Sequence[Admission]) -> "_Fit":
        if not train:
            raise ValueError("no admissions to fit a baseline on")
        spellings = formulary_of(train)
        names = {normalise_string(name): column for column, name in enumerate(spellings)}
        codes = sorted({code for one in train for code in known_items(one)})
        code_column = {code: column for column, code in enumerate(codes)}
        return cls(
            codes_nc=presence(map(known_items, train), code_column),
            drugs_nd=presence((map(normalise_string, one.drugs) for one in train), names),
            ordered_nd=presence((map(normalise_string, one.ordered) for one in train), names),
            code_column=code_column,
            spellings=spellings,
        )

    @property
    def frequency_d(self) -> NDArray[np.float64]:
        frequency: NDArray[np.float64] = self.drugs_nd.sum(axis=0) / self.drugs_nd.shape[0]
        return frequency

    def codes_of(self, admissions: Sequence[Admission]) -> "csr_array":
        return presence(map(known_items, admissions), self.code_column)

    def named(self, drugs: NDArray[np.intp]) -> DrugList:
        return tuple(self.spellings[drug] for drug in drugs)


def presence(rows: Iterable[Iterable[str]], column: Mapping[str, int]) -> "csr_array":
    """Return a 0/1 matrix (rows, columns); items without a column are unknown and left out."""
    from scipy.sparse import csr_array

    found = [sorted({column[item] for item in row if item in column}) for row in rows]
    return csr_array(
        (
            np.ones(sum(map(len, found))),
            np.concatenate([np.array(row, dtype=np.int32) for row in found]),
            np.cumsum([0, *map(len, found)], dtype=np.int32),
        ),
        shape=(len(found), len(column)),
    )


def _ranked(score_d: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.argsort(-score_d, kind="stable")


def largest(score_n: NDArray[np.float64], number: int) -> NDArray[np.intp]:
    """Return the places of the largest scores without sorting all; ties go to the earlier."""
    bound = np.partition(score_n, -number)[-number]
    above = np.flatnonzero(score_n > bound)
    return np.concatenate([above, np.flatnonzero(score_n == bound)[: number - len(above)]])


def _best_length(fit: _Fit, ranked_d: NDArray[np.intp]) -> int:
    """Return the length of the popular list with the best mean Jaccard on the training split."""
    offered = ranked_d[:_LONGEST_POPULAR_LIST]
    lengths_k = np.arange(1, len(offered) + 1)
    total_k = np.zeros(len(offered))
    true_n = fit.drugs_nd.sum(axis=1)
    for start in range(0, fit.drugs_nd.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        hits_bk = fit.drugs_nd[rows][:, offered].toarray().cumsum(axis=1)
        listed_bk = lengths_k - fit.ordered_nd[rows][:, offered].toarray().cumsum(axis=1)
        total_k += (hits_bk / (true_n[rows, None] + listed_bk - hits_bk)).sum(axis=0)
    return int(lengths_k[total_k.argmax()])
