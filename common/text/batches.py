"""Tokens of an admission, and packed, padding-free batches.

Prompt and answer are tokenised apart, so training sees exactly the prompt that generation starts
from. Labels are positions, never a mask over pad ids (pad equals end-of-answer in many
tokenizers): the answer's tokens and its end token carry the loss, the prompt never does.

Shapes: T packed tokens, S segments (samples), N labelled tokens.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.config import TextConfig
from common.errors import SettingError
from common.text.chat import prompt_tokens
from common.text.known import NOTHING, LeftOut, items, with_items
from common.text.prompts import messages, render_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.data.samples import Admission


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One admission as tokens."""

    input_ids: tuple[int, ...]
    """Prompt, answer, end token."""
    answer_start: int
    """Index of the answer's first token."""
    unit: int
    """Local key of the patient, the unit of privacy; it never leaves this process."""
    left_out: LeftOut = NOTHING
    """Whole items left out of the prompt to keep the length."""
    dropped_drugs: int = 0
    """Whole drugs left out at the answer's end to keep the length."""
    set_at: int = 0
    """Index of a token in whose place any of ``set_tokens`` would be right."""
    set_tokens: tuple[int, ...] = ()
    """Tokens that all count there; empty: no such place."""

    @property
    def label_tokens(self) -> int:
        """Number of labels, which weigh the same: one a token of the answer, more at ``set_at``."""
        return len(self.input_ids) - self.answer_start + max(0, len(self.set_tokens) - 1)

    def labels(self) -> Iterator[tuple[int, int]]:
        """Yield (index of the token before, label)."""
        for place in range(self.answer_start, len(self.input_ids)):
            if self.set_tokens and place == self.set_at:
                yield from ((place - 1, token) for token in self.set_tokens)
            else:
                yield place - 1, self.input_ids[place]

    def in_epoch(self, epoch: int) -> "Encoded":
        """Return the sample as training sees it in one pass over the data."""
        return self


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Samples laid end to end, without padding.

    Attributes:
        input_ids: [1, T] int64.
        position_ids: [1, T] int64, restarting at 0 in every segment.
        cu_seqlens: S + 1 token offsets on the host, from 0 to T.
        label_positions_N: Packed index of the token *before* each labelled one: the hidden state
            there predicts the label. Where several labels count, it stands there as often.
        labels_N: Token ids to predict.
        label_segments_N: Segment of each label.
        units: Unit of privacy of each segment.
        label_bounds: S + 1 offsets of the segments' labels.
        state_bounds: The same of the tokens before them, once each.
        repeats: Whether some position stands there more than once.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: tuple[int, ...]
    label_positions_N: Tensor
    labels_N: Tensor
    label_segments_N: Tensor
    units: tuple[int, ...]
    label_bounds: tuple[int, ...]
    state_bounds: tuple[int, ...]
    repeats: bool = False

    @property
    def tokens(self) -> int:
        """Number of packed tokens T."""
        return self.cu_seqlens[-1]

    @property
    def segments(self) -> int:
        """Number of samples S."""
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch with its tensors on ``device``."""
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        moved: dict[str, Any] = {n: v.to(device) for n, v in values if isinstance(v, Tensor)}
        return replace(self, **moved)


def encode_prompt(
    admission: "Admission",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text: TextConfig,
    max_length_tokens: int,
) -> tuple[list[int], LeftOut]:
    """Tokenise one admission's prompt up to the point where the answer starts.

    The prompt has half of the length at most, whatever the answer is: what is left out must not
    depend on what is to be predicted. Whole items are dropped: the oldest visits first, and
    diagnoses from the end (``common.text.known``).

    Args:
        admission: The sample; its drugs are not read.
        tokenizer: One with a chat template.
        text: What the run asks.
        max_length_tokens: Longest prompt and answer together.

    Returns:
        Token ids, and what is left out.

    Raises:
        UserError: If even a prompt without any item is too long.
    """

    def tokens(kept: int) -> list[int]:
        shown, _ = with_items(admission, kept)
        system, user = (message["content"] for message in messages(shown, text))
        return prompt_tokens(tokenizer, system, user)

    ids, dropped = _fit(tokens, items(admission), max_length_tokens // 2)
    return ids, with_items(admission, items(admission) - dropped)[1]


def encode(
    admission: "Admission",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text: TextConfig,
    max_length_tokens: int,
) -> Encoded:
    """Tokenise one training sample: prompt, answer, end token.

    Args:
        admission: The sample.
        tokenizer: One with a chat template and an end token.
        text: What the run asks.
        max_length_tokens: Longest sample; whole drugs are dropped from the answer's end, and
            counted, when the prompt and the answer do not fit.

    Raises:
        UserError: If not even the empty answer fits.
    """
    prompt, left_out = encode_prompt(
        admission, tokenizer, text=text, max_length_tokens=max_length_tokens
    )
    bare = Encoded(
        input_ids=tuple(prompt),
        answer_start=len(prompt),
        unit=admission.patient,
        left_out=left_out,
    )
    return with_drugs(bare, admission.drugs, tokenizer, max_length_tokens)


def with_drugs(
    sample: Encoded,
    drugs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length_tokens: int,
) -> Encoded:
    """Return a sample's prompt with a list and the end token.

    Whole drugs are dropped from the list's end, and counted, to keep the length.

    Raises:
        UserError: If not even the empty list fits.
    """
    prompt = sample.input_ids[: sample.answer_start]

    def tokens(kept: int) -> list[int]:
        text = render_answer(drugs[:kept])
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    answer, dropped = _fit(tokens, len(drugs), max_length_tokens - len(prompt))
    return Encoded(
        input_ids=(*prompt, *answer),
        answer_start=len(prompt),
        unit=sample.unit,
        left_out=sample.left_out,
        dropped_drugs=dropped,
    )


def pack(samples: Sequence[Encoded]) -> PackedBatch:
    """Lay samples end to end as one batch without padding.

    >>> batch = pack([Encoded(input_ids=(5, 6, 7), answer_start=2, unit=1),
    ...               Encoded(input_ids=(8, 9), answer_start=1, unit=2)])
    >>> batch.cu_seqlens, batch.position_ids.tolist()
    ((0, 3, 5), [[0, 1, 2, 0, 1]])
    >>> batch.label_positions_N.tolist(), batch.labels_N.tolist()
    ([1, 3], [7, 9])

    Raises:
        ValueError: If there is no sample, or one has no prompt.
    """
    if not samples or any(sample.answer_start < 1 for sample in samples):
        raise ValueError("packing needs at least one sample, each with a prompt")
    bounds, label_bounds, state_bounds = [0], [0], [0]
    ids: list[int] = []
    positions: list[int] = []
    label_positions: list[int] = []
    label_segments: list[int] = []
    labels: list[int] = []
    for segment, sample in enumerate(samples):
        length, start = len(sample.input_ids), bounds[-1]
        ids.extend(sample.input_ids)
        positions.extend(range(length))
        for place, label in sample.labels():
            label_positions.append(start + place)
            labels.append(label)
        label_segments.extend([segment] * sample.label_tokens)
        bounds.append(start + length)
        label_bounds.append(len(labels))
        state_bounds.append(state_bounds[-1] + length - sample.answer_start)
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=tuple(bounds),
        label_positions_N=torch.tensor(label_positions, dtype=torch.int64),
        labels_N=torch.tensor(labels, dtype=torch.int64),
        label_segments_N=torch.tensor(label_segments, dtype=torch.int64),
        units=tuple(sample.unit for sample in samples),
        label_bounds=tuple(label_bounds),
        state_bounds=tuple(state_bounds),
        repeats=any(sample.set_tokens for sample in samples),
    )


def _fit(tokens: Callable[[int], list[int]], items: int, limit: int) -> tuple[list[int], int]:
    """Return the tokens with the most leading items that fit, and the number left out."""
    ids = tokens(items)
    if len(ids) <= limit:
        return ids, 0
    kept = bisect_right(range(items), limit, key=lambda number: len(tokens(number))) - 1
    if kept < 0:
        raise SettingError(
            f"train.max-length: {limit} tokens do not hold a prompt's or answer's frame",
            fix="raise train.max-length",
        )
    return tokens(kept), items - kept
