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
from typing import Protocol

import torch
from torch import Tensor

from common.model.session import Session


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
        # transformers is imported when something is generated, not when help is asked for.
        from common.evaluation.slots import SlotCache, cache_argument

        self._cache_argument = cache_argument(session.model.model)
        self._cache = SlotCache(
            session.spec.shape,
            slots=self._slots,
            columns=max(map(len, prompts)) + max_new_tokens,
            like=session.model.model.embed_tokens.weight,
        )

    def run(self) -> list[Generated]:
        while self._waiting or self._rows:
            while self._waiting and len(self._rows) < self._slots:
                self._enter(self._waiting.pop())
            if self._rows:
                self._step()
        return [self._results[place] for place in range(len(self._prompts))]

    def _enter(self, place: int) -> None:
        """Run one prompt into the first free slot; it yields its first token."""
        ids_1T = torch.tensor([list(self._prompts[place])], device=self._session.torch_device)
        self._cache.expect_prompt(len(self._rows))
        hidden_1TD = self._pass(input_ids=ids_1T)
        matcher = self._matcher() if self._matcher else None
        row = _Row(prompt=place, length=ids_1T.shape[1], matcher=matcher)
        self._rows.append(row)
        self._take([row], hidden_1TD[:, -1])

    def _step(self) -> None:
        """Add one token to every occupied slot."""
        device, rows = self._session.torch_device, self._rows
        longest = max(row.length for row in rows)
        lengths_B = torch.tensor([row.length for row in rows], device=device)
        last_B1 = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        columns_L = torch.arange(longest + 1, device=device)
        self._cache.expect_tokens(lengths_B, longest)
        hidden_B1D = self._pass(
            input_ids=last_B1,
            position_ids=lengths_B[:, None],
            # transformers hands a 4-D mask on as it is.
            attention_mask=(columns_L <= lengths_B[:, None])[:, None, None],
        )
        for row in rows:
            row.length += 1
        self._take(list(rows), hidden_B1D[:, 0])

    def _pass(self, **inputs: Tensor) -> Tensor:
        """Run the backbone on the cache; returns the hidden state of every token."""
        named = {**inputs, self._cache_argument: self._cache}
        hidden: Tensor = self._session.model.model(**named, use_cache=True).last_hidden_state
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
