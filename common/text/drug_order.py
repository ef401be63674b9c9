"""The order of the drugs in what is learnt.

An answer is a set, and a model writes it as a list. By first start, as the stay was, or by name, a
model learns one order too; in a new random order every time, the first drug it names is drawn from
the list evenly, so that its probability there ranks drugs by how likely they are in the list.

As a set, that is said outright: where the first drug begins, the beginnings of all drugs of the
list count (the expectation over random orders, from one pass over the prompt), and of a new random
order only the first few drugs are written, which tell apart the names that begin alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from common.config import Config
from common.data.names import normalise_string
from common.errors import UserError
from common.seeds import stream
from common.text.batches import Encoded, with_drugs
from common.text.prompts import NEXT_ITEM, render_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.data.samples import Admission

WRITTEN_OF_A_SET = 4
"""Drugs whose names are written out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffled(Encoded):
    """A sample whose drugs stand in another order in every pass over the data."""

    drugs: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase"
    max_length_tokens: int
    seed: int
    names: tuple[str | int, ...]
    """Hospital and place (with privacy the admission): with the seed and the epoch, all that an
    order depends on."""

    def in_epoch(self, epoch: int) -> Encoded:
        """Return the sample in one pass's order, a pure function of seed, place and epoch."""
        return with_drugs(self, self.shuffled(epoch), self.tokenizer, self.max_length_tokens)

    def shuffled(self, epoch: int) -> list[str]:
        """Return the drugs in one pass's order."""
        order = stream(self.seed, "drug-order", *self.names, epoch).permutation(len(self.drugs))
        return [self.drugs[place] for place in order]


@dataclass(frozen=True, kw_only=True, slots=True)
class DrugSet(Shuffled):
    """A sample in which any drug of the list may come first."""

    header_tokens: int
    """Tokens of an answer before its first drug."""
    first_tokens: tuple[int, ...]
    """Of each drug's name."""

    def in_epoch(self, epoch: int) -> Encoded:
        """Return the prompt and a few drugs, others in every pass."""
        few = self.shuffled(epoch)[:WRITTEN_OF_A_SET]
        seen = with_drugs(self, few, self.tokenizer, self.max_length_tokens)
        # A list that goes on has no end here to learn.
        written = len(few) - seen.dropped_drugs
        end = len(seen.input_ids) - (written < len(self.drugs))
        return replace(
            seen,
            input_ids=seen.input_ids[:end],
            set_at=self.answer_start + self.header_tokens,
            # Where not even one drug fits, no drug begins.
            set_tokens=self.first_tokens if written else (),
        )


def in_order(
    samples: Sequence[Encoded],
    admissions: Sequence["Admission"],
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    hospital: str,
) -> tuple[Encoded, ...]:
    """Put the drugs of a hospital's training samples into the order that ``data.drug-order`` names.

    Args:
        samples: As the tables have them, by first start.
        admissions: What they were encoded from.
        tokenizer: The backbone's.
        config: ``data.drug-order``, ``train.seed``, ``train.max-length``, and whether the run is
            private are read.
        hospital: Its name; two hospitals shuffle differently.
    """
    order, length = config.data.drug_order, config.train.max_length
    # A place follows from who else is there, and a patient's gradient must not.
    private = config.privacy.is_on
    if order == "name":
        return tuple(
            with_drugs(sample, sorted(one.drugs, key=normalise_string), tokenizer, length)
            for sample, one in zip(samples, admissions, strict=True)
        )
    if order in ("shuffled", "set"):
        shuffled = tuple(
            Shuffled(
                **_values(sample),
                drugs=one.drugs,
                tokenizer=tokenizer,
                max_length_tokens=length,
                seed=config.train.seed,
                names=(hospital, *(("admission", one.admission) if private else (place,))),
            )
            for place, (sample, one) in enumerate(zip(samples, admissions, strict=True))
        )
        return shuffled if order == "shuffled" else _as_sets(shuffled, tokenizer)
    return tuple(samples)


def _values(sample: Encoded) -> dict[str, Any]:
    return {one.name: getattr(sample, one.name) for one in fields(sample)}


def _as_sets(
    samples: Sequence[Shuffled], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[DrugSet, ...]:
    header = tokenizer(render_answer([]) + NEXT_ITEM, add_special_tokens=False)["input_ids"]
    names = sorted({drug for one in samples for drug in one.drugs})
    texts = [render_answer([name]) for name in names]
    written = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    if any(ids[: len(header)] != header or len(ids) == len(header) for ids in written):
        raise UserError(
            "data.drug-order=set: this backbone's tokenizer merges a list's beginning with the "
            "first drug's name",
            allowed="first-start, name, shuffled",
            fix="set data.drug-order to shuffled",
        )
    first = {name: ids[len(header)] for name, ids in zip(names, written, strict=True)}
    return tuple(
        DrugSet(
            **_values(sample),
            header_tokens=len(header),
            first_tokens=tuple(first[drug] for drug in sample.drugs),
        )
        for sample in samples
    )
