"""Batched greedy generation: no padding, and no step spent on a finished answer.

Every sequence has a slot of one preallocated key/value cache. Prompts enter packed, as in
training; each step then adds one token to every slot, and a slot that finishes is given to the
next prompt. A slot starts at column 0 and only its own length is attended to, so nothing depends
on a padding token (which equals the end token in many tokenizers).

Shapes: B occupied slots, H query heads, G key/value heads, L cache columns, E head width,
T packed prompt tokens, V vocabulary.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from common.model.attention import Packing
from common.model.session import Session
from common.text.batches import Encoded, pack

if TYPE_CHECKING:
    from common.model.backbone import BackboneShape

# Prompts that enter together, in tokens: bounds the memory of their forward pass.
_PREFILL_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One answer as tokens."""

    tokens: tuple[int, ...]
    """Without the end token."""
    finished: bool
    """False when the token limit cut it."""


class Matcher(Protocol):
    """What one sequence may say next under a grammar."""

    def choose(self, logits_V: Tensor, preferred: int) -> int:
        """Return the likeliest allowed token and move on by it.

        Args:
            logits_V: Logits of the next token.
            preferred: Their argmax.
        """
        ...


@dataclass(kw_only=True)
class _Row:
    """A sequence in its slot."""

    prompt: int
    """Place of its prompt in the caller's list."""
    length: int
    """Columns of the cache that it fills."""
    tokens: list[int] = field(default_factory=list)
    matcher: Matcher | None = None


class _SlotCache:
    """Keys and values of all slots; stands in for transformers' cache inside one call.

    ``segments`` or ``lengths_B`` say what the next forward pass brings: whole prompts for new
    slots, or one token for each occupied slot.
    """

    def __init__(self, shape: "BackboneShape", *, slots: int, columns: int, like: Tensor) -> None:
        size = (shape.layers, 2, slots, shape.kv_heads, columns, shape.head_dim)
        # Zeros, not empty: a weight of 0 times a stray NaN would be NaN.
        self._kv = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._segments: list[tuple[int, int, int]] = []
        self._lengths_B = torch.empty(0)
        self._longest = 0

    def expect_prompts(self, segments: list[tuple[int, int, int]]) -> None:
        """Next come prompts: (slot, first token, end) of each in the packed batch."""
        self._segments = segments

    def expect_tokens(self, lengths_B: Tensor, longest: int) -> None:
        """Next comes one token per slot, to be written behind ``lengths_B`` columns."""
        self._segments, self._lengths_B, self._longest = [], lengths_B, longest + 1

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        self._kv[:, :, target] = self._kv[:, :, source]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store what a layer computed and return what it attends to (called by transformers)."""
        keys, values = self._kv[layer]
        if self._segments:
            for slot, start, stop in self._segments:
                keys[slot, :, : stop - start] = key[0, :, start:stop]
                values[slot, :, : stop - start] = value[0, :, start:stop]
            return key, value
        slots_B = torch.arange(len(key), device=key.device)
        keys[slots_B, :, self._lengths_B] = key[:, :, 0]
        values[slots_B, :, self._lengths_B] = value[:, :, 0]
        here = slice(None, len(key)), slice(None), slice(None, self._longest)
        return keys[here], values[here]


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    matcher: Callable[[], Matcher] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Continue every prompt greedily until its end token or ``max_new_tokens``.

    Deterministic. The adapter is folded into the weights meanwhile.

    Args:
        session: Backbone and adapter.
        prompts: Token ids, each at least one.
        max_new_tokens: Longest continuation.
        batch_size: Sequences that are continued together.
        matcher: Makes what constrains one sequence to a grammar; unconstrained when None.
        progress: Called with (finished, all) whenever a sequence is finished.

    Returns:
        The continuations in the order of the prompts.
    """
    if not prompts:
        return []
    with torch.inference_mode(), session.adapter.merged():
        return _Generation(session, prompts, max_new_tokens, batch_size, matcher, progress).run()


class _Generation:
    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int,
        matcher: Callable[[], Matcher] | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._session, self._prompts, self._limit = session, prompts, max_new_tokens
        self._matcher, self._progress = matcher, progress
        self._slots = min(batch_size, len(prompts))
        self._ends = _end_tokens(session)
        # Longest first: the last ones, which run with few beside them, are the cheapest.
        self._waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), -i))
        self._rows: list[_Row] = []
        self._results: dict[int, Generated] = {}
        self._cache = _SlotCache(
            session.spec.shape,
            slots=self._slots,
            columns=max(map(len, prompts)) + max_new_tokens,
            like=session.model.model.embed_tokens.weight,
        )

    def run(self) -> list[Generated]:
        while self._waiting or self._rows:
            if self._waiting and len(self._rows) < self._slots:
                self._enter()
            if self._rows:
                self._step()
        return [self._results[place] for place in range(len(self._prompts))]

    def _enter(self) -> None:
        """Run the prompts that the free slots take; each yields its first token."""
        entering: list[_Row] = []
        tokens = 0
        while self._waiting and len(self._rows) + len(entering) < self._slots:
            length = len(self._prompts[self._waiting[-1]])
            if entering and tokens + length > _PREFILL_TOKENS:
                break
            tokens += length
            matcher = self._matcher() if self._matcher else None
            entering.append(_Row(prompt=self._waiting.pop(), length=length, matcher=matcher))
        samples = [
            Encoded(input_ids=tuple(self._prompts[row.prompt]), answer_start=row.length, unit=0)
            for row in entering
        ]
        batch = pack(samples).to(self._session.torch_device)
        packing = Packing.of(batch, self._session.attention.value, self._session.torch_device)
        slots = range(len(self._rows), self._slots)
        bounds = itertools.pairwise(batch.cu_seqlens)
        self._cache.expect_prompts([(s, *ab) for s, ab in zip(slots, bounds, strict=False)])
        hidden_TD = self._forward(
            batch.input_ids,
            batch.position_ids,
            packing.bounds_device.view(1, 1, 1, -1),
            packing=packing,
        )[0]
        self._rows += entering
        self._take(entering, hidden_TD[packing.bounds_device[1:].long() - 1])

    def _step(self) -> None:
        """Add one token to every occupied slot."""
        device, rows = self._session.torch_device, self._rows
        longest = max(row.length for row in rows)
        lengths_B = torch.tensor([row.length for row in rows], device=device)
        last_B1 = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        columns_L = torch.arange(longest + 1, device=device)
        seen_B11L = (columns_L <= lengths_B[:, None])[:, None, None]
        self._cache.expect_tokens(lengths_B, longest)
        hidden_B1D = self._forward(last_B1, lengths_B[:, None], seen_B11L)
        for row in rows:
            row.length += 1
        self._take(list(rows), hidden_B1D[:, 0])

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, **packed: Any) -> Tensor:
        out = self._session.model.model(
            input_ids=ids,
            position_ids=positions,
            # transformers hands a 4-D mask on as it is.
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            **packed,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _take(self, rows: list[_Row], hidden_BD: Tensor) -> None:
        """Choose each row's next token, and free the slots of those that end."""
        logits_BV = self._session.model.lm_head(hidden_BD)
        chosen: list[int] = logits_BV.argmax(-1).tolist()
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if row.matcher is not None:
                token = row.matcher.choose(logits_BV[place], token)
            if token not in self._ends:
                row.tokens.append(token)
            if token in self._ends or len(row.tokens) == self._limit:
                self._finish(row, finished=token in self._ends)

    def _finish(self, row: _Row, *, finished: bool) -> None:
        self._results[row.prompt] = Generated(tokens=tuple(row.tokens), finished=finished)
        slot = next(slot for slot, other in enumerate(self._rows) if other is row)
        last = self._rows.pop()
        if last is not row:
            self._cache.move(len(self._rows), slot)
            self._rows[slot] = last
        if self._progress:
            self._progress(len(self._results), len(self._prompts))


def _end_tokens(session: Session) -> frozenset[int]:
    """The tokenizer's end token, and what else the backbone's own configuration ends at."""
    also = session.model.generation_config.eos_token_id
    listed = also if isinstance(also, list) else [] if also is None else [also]
    return frozenset([session.tokenizer.eos_token_id, *listed])
