"""The order of the drugs in what is learnt.

An answer is a set, and a model writes it as a list. By first start, as the stay was, or by name, a
model learns one order too; in a new random order every time, the first drug it names is drawn from
the list evenly, so that its probability there ranks drugs by how likely they are in the list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.config import Config
from common.data.names import normalise_string
from common.seeds import stream
from common.text.batches import Encoded, encode_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.data.samples import Admission


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffled(Encoded):
    """A sample whose drugs stand in another order in every pass over the data."""

    drugs: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase"
    max_length_tokens: int
    seed: int
    names: tuple[str | int, ...]
    """Hospital and place: with the seed and the epoch, all that an order depends on."""

    def in_epoch(self, epoch: int) -> Encoded:
        """Return the sample in one pass's order, a pure function of seed, place and epoch."""
        order = stream(self.seed, "drug-order", *self.names, epoch).permutation(len(self.drugs))
        return _with_drugs(
            self, [self.drugs[place] for place in order], self.tokenizer, self.max_length_tokens
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
        config: ``data.drug-order``, ``train.seed`` and ``train.max-length`` are read.
        hospital: Its name; two hospitals shuffle differently.
    """
    order, length = config.data.drug_order, config.train.max_length
    if order == "name":
        return tuple(
            _with_drugs(sample, sorted(one.drugs, key=normalise_string), tokenizer, length)
            for sample, one in zip(samples, admissions, strict=True)
        )
    if order == "shuffled":
        return tuple(
            Shuffled(
                input_ids=sample.input_ids,
                answer_start=sample.answer_start,
                unit=sample.unit,
                left_out=sample.left_out,
                dropped_drugs=sample.dropped_drugs,
                drugs=one.drugs,
                tokenizer=tokenizer,
                max_length_tokens=length,
                seed=config.train.seed,
                names=(hospital, place),
            )
            for place, (sample, one) in enumerate(zip(samples, admissions, strict=True))
        )
    return tuple(samples)


def _with_drugs(
    sample: Encoded,
    drugs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length_tokens: int,
) -> Encoded:
    prompt = sample.input_ids[: sample.answer_start]
    answer, dropped = encode_answer(drugs, tokenizer, max_tokens=max_length_tokens - len(prompt))
    return Encoded(
        input_ids=(*prompt, *answer),
        answer_start=len(prompt),
        unit=sample.unit,
        left_out=sample.left_out,
        dropped_drugs=dropped,
    )
