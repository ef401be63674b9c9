"""Batched greedy generation: no padding, and no step spent on a finished answer.

Every sequence has a slot of one preallocated key/value cache. A prompt enters by a forward pass of
its own; each step then adds one token to every slot, and a slot that finishes is given to the
next prompt. A slot starts at column 0 and only its own length is attended to, so nothing depends
on a padding token (which equals the end token in many tokenizers).

Shapes: B occupied slots, H query heads, G key/value heads, L cache columns, E head width,
T prompt tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from common.model.session import Session

if TYPE_CHECKING:
    from transformers import DynamicCache

    from common.model.backbone.load import BackboneShape


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


class MovableSlots(Protocol):
    """Keys and values by slot."""

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        ...


@dataclass(kw_only=True)
class SlotRow:
    """A sequence in its slot."""

    prompt: int
    """Place of its prompt in the caller's list."""
    length: int
    """Columns of the cache that it fills."""
    tokens: list[int] = field(default_factory=list)
    matcher: Matcher | None = None


class _SlotCache:
    """Keys and values of all slots; stands in for transformers' cache while tokens are added."""

    def __init__(self, shape: "BackboneShape", *, slots: int, columns: int, like: Tensor) -> None:
        size = (shape.layers, 2, slots, shape.kv_heads, columns, shape.head_dim)
        # Zeros, not empty: a weight of 0 times a stray NaN would be NaN.
        self._kv = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._lengths_B = torch.empty(0)
        self._longest = 0

    def fill(self, slot: int, prompt: "DynamicCache") -> None:
        """Copy what one prompt's forward pass left into a slot."""
        for here, layer in zip(self._kv, prompt.layers, strict=True):
            here[0, slot, :, : layer.keys.shape[2]] = layer.keys[0]
            here[1, slot, :, : layer.values.shape[2]] = layer.values[0]

    def expect_tokens(self, lengths_B: Tensor, longest: int) -> None:
        """Next comes one token per slot, to be written behind ``lengths_B`` columns."""
        self._lengths_B, self._longest = lengths_B, longest + 1

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        self._kv[:, :, target] = self._kv[:, :, source]

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new column and return what it attends to (called by transformers)."""
        keys, values = self._kv[layer]
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
    from common.evaluation import decode_graph

    how = decode_graph.GraphGeneration if decode_graph.supported(session) else SlotGeneration
    with torch.inference_mode(), session.adapter.merged():
        return how(session, prompts, max_new_tokens, batch_size, matcher, progress).run()


class SlotGeneration:
    """One call of ``generate``: rows in their slots, and the prompts that wait."""

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
        self._rows: list[SlotRow] = []
        self._results: dict[int, Generated] = {}
        self._store = self._new_cache(self._slots, max(map(len, prompts)) + max_new_tokens)

    def run(self) -> list[Generated]:
        """Generate until every prompt has its answer; returns them in the prompts' order."""
        while self._waiting or self._rows:
            self._admit()
            if self._rows:
                self._step()
        return [self._results[place] for place in range(len(self._prompts))]

    def _new_cache(self, slots: int, columns: int) -> MovableSlots:
        self._cache = _SlotCache(
            self._session.spec.shape,
            slots=slots,
            columns=columns,
            like=self._session.model.model.embed_tokens.weight,
        )
        return self._cache

    def _admit(self) -> None:
        """Give the free slots to the prompts that wait."""
        while self._waiting and len(self._rows) < self._slots:
            self._enter(self._waiting.pop())

    def _enter(self, place: int) -> None:
        """Run one prompt into the first free slot; it yields its first token."""
        ids_1T = torch.tensor([list(self._prompts[place])], device=self._session.torch_device)
        out = self._session.model.model(input_ids=ids_1T, use_cache=True)
        matcher = self._matcher() if self._matcher else None
        row = SlotRow(prompt=place, length=ids_1T.shape[1], matcher=matcher)
        self._cache.fill(len(self._rows), out.past_key_values)
        self._rows.append(row)
        self._take([row], self._session.model.lm_head(out.last_hidden_state[:, -1]))

    def _step(self) -> None:
        """Add one token to every occupied slot."""
        device, rows = self._session.torch_device, self._rows
        longest = max(row.length for row in rows)
        lengths_B = torch.tensor([row.length for row in rows], device=device)
        last_B1 = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        columns_L = torch.arange(longest + 1, device=device)
        self._cache.expect_tokens(lengths_B, longest)
        out = self._session.model.model(
            input_ids=last_B1,
            position_ids=lengths_B[:, None],
            # transformers hands a 4-D mask on as it is.
            attention_mask=(columns_L <= lengths_B[:, None])[:, None, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        for row in rows:
            row.length += 1
        self._take(list(rows), self._session.model.lm_head(out.last_hidden_state[:, 0]))

    def _take(self, rows: list[SlotRow], logits_BV: Tensor) -> None:
        """Choose each row's next token, and free the slots of those that end."""
        chosen: list[int] = logits_BV.argmax(-1).tolist()
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if row.matcher is not None:
                token = row.matcher.choose(logits_BV[place], token)
            if token not in self._ends:
                row.tokens.append(token)
            if token in self._ends or len(row.tokens) == self._limit:
                self._finish(row, finished=token in self._ends)

    def _finish(self, row: SlotRow, *, finished: bool) -> None:
        self._results[row.prompt] = Generated(tokens=tuple(row.tokens), finished=finished)
        slot = next(slot for slot, other in enumerate(self._rows) if other is row)
        last = self._rows.pop()
        if last is not row:
            self._store.move(len(self._rows), slot)
            self._rows[slot] = last
        if self._progress:
            self._progress(len(self._results), len(self._prompts))


def _end_tokens(session: Session) -> frozenset[int]:
    """The tokenizer's end token, and what else the backbone's own configuration ends at."""
    also = session.model.generation_config.eos_token_id
    listed = also if isinstance(also, list) else [] if also is None else [also]
    return frozenset([session.tokenizer.eos_token_id, *listed])
