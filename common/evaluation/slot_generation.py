"""Batched greedy generation: no padding, and no step spent on a finished answer.

Every sequence has a slot of one preallocated key/value cache. Prompts enter by packed forward
passes, as many in each as have a free slot; each step then adds one token to every slot, and a slot
that finishes is given to the next prompt. A slot starts at column 0 and only its own length is
attended to, so nothing depends on a padding token (which equals the end token in many tokenizers).

Shapes: B occupied slots, H query heads, G key/value heads, L cache columns, E head width,
G key/value heads, T packed prompt tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from common.model.session import Session
from common.text.batches import Encoded, pack


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One answer as tokens."""

    tokens: tuple[int, ...]
    """Without the end token."""
    finished: bool
    """False when the token limit cut it."""


class Matcher(Protocol):
    """What one sequence may say next under a grammar."""

    def accepts(self, preferred: int) -> bool:
        """Move on by the likeliest token of all, if it is allowed; else stay where it is."""
        ...

    def choose(self, logits_V: Tensor, preferred: int) -> int:
        """Return the likeliest allowed token and move on by it.

        Args:
            logits_V: Logits of the next token, on the host.
            preferred: Their argmax.
        """
        ...


class Slots(Protocol):
    """Keys and values by slot."""

    def fill(self, layer: int, k_TGE: Tensor, v_TGE: Tensor, slot_T: Tensor, at_T: Tensor) -> None:
        """Write what one layer made of packed prompts into their slots, from column 0 on."""
        ...

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


class SlotGeneration:
    """One call of ``generate``: rows in their slots, and the prompts that wait."""

    prefill_tokens = 2048
    """Longest packed pass over prompts (one longer prompt goes alone)."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int,
        matcher: Callable[[int], Matcher] | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.session, self.prompts, self._limit = session, prompts, max_new_tokens
        self.matcher, self._progress = matcher, progress
        self.slots = min(batch_size, len(prompts))
        self._ends = _end_tokens(session)
        # Longest first: the last ones, which run with few beside them, are the cheapest.
        self.waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), -i))
        self.rows: list[SlotRow] = []
        self._results: dict[int, Generated] = {}
        self._store = self._new_cache(self.slots, max(map(len, prompts)) + max_new_tokens)

    def run(self) -> list[Generated]:
        """Generate until every prompt has its answer; returns them in the prompts' order."""
        while self.waiting or self.rows:
            self._admit()
            if self.rows:
                self._step()
        return [self._results[place] for place in range(len(self.prompts))]

    def _new_cache(self, slots: int, columns: int) -> Slots:
        # transformers is imported when something is generated, not when help is asked for.
        from common.evaluation.slots import SlotCache, cache_argument

        self._cache_argument = cache_argument(self.session.model.model)
        self._cache = SlotCache(
            self.session.spec.shape,
            slots=slots,
            columns=columns,
            like=self.session.model.model.embed_tokens.weight,
        )
        return self._cache

    def _admit(self) -> None:
        """Give the free slots to the prompts that wait, in as few passes as hold them."""
        while self.waiting and len(self.rows) < self.slots:
            places = [self.waiting.pop()]
            if not self.session.lean:
                self._enter(places[0])
                continue
            size = len(self.prompts[places[0]])
            while self.waiting and len(self.rows) + len(places) < self.slots:
                size += len(self.prompts[self.waiting[-1]])
                if size > self.prefill_tokens:
                    break
                places.append(self.waiting.pop())
            self._prefill(places)

    def _prefill(self, places: list[int]) -> None:
        """Run prompts into the first free slots; they yield their first tokens."""
        device, first = self.session.torch_device, len(self.rows)
        prompts = [tuple(self.prompts[place]) for place in places]
        batch = pack([Encoded(input_ids=ids, answer_start=len(ids), unit=0) for ids in prompts])
        batch = batch.to(device)
        lengths = torch.tensor([len(ids) for ids in prompts])
        slot_T = torch.arange(first, first + len(prompts)).repeat_interleave(lengths).to(device)
        at_T = batch.position_ids[0]

        def keep(layer: int, k_TGE: Tensor, v_TGE: Tensor) -> None:
            self._store.fill(layer, k_TGE, v_TGE, slot_T, at_T)

        hidden_TD = self.session.hidden_states(batch, keep=keep)
        for place, ids in zip(places, prompts, strict=True):
            matcher = self.matcher(place) if self.matcher else None
            self.rows.append(SlotRow(prompt=place, length=len(ids), matcher=matcher))
        last_B = torch.tensor(batch.cu_seqlens[1:], device=device) - 1
        self.take(self.rows[first:], self.session.model.lm_head(hidden_TD[last_B]))

    def _enter(self, place: int) -> None:
        """Run one prompt through transformers' own layers."""
        ids_1T = torch.tensor([list(self.prompts[place])], device=self.session.torch_device)
        self._cache.expect_prompt(len(self.rows))
        hidden_1TD = self._pass(input_ids=ids_1T)
        matcher = self.matcher(place) if self.matcher else None
        row = SlotRow(prompt=place, length=ids_1T.shape[1], matcher=matcher)
        self.rows.append(row)
        self.take([row], self.session.model.lm_head(hidden_1TD[:, -1]))

    def _step(self) -> None:
        """Add one token to every occupied slot."""
        device, rows = self.session.torch_device, self.rows
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
        self.take(list(rows), self.session.model.lm_head(hidden_B1D[:, 0]))

    def _pass(self, **inputs: Tensor) -> Tensor:
        """Run the backbone on the cache; returns the hidden state of every token."""
        named = {**inputs, self._cache_argument: self._cache}
        hidden: Tensor = self.session.model.model(**named, use_cache=True).last_hidden_state
        return hidden

    def take(self, rows: list[SlotRow], logits_BV: Tensor) -> None:
        """Choose each row's next token, and free the slots of those that end."""
        chosen: list[int] = logits_BV.argmax(-1).tolist()
        refused = [
            (place, row.matcher)
            for place, row in enumerate(rows)
            if row.matcher is not None and not row.matcher.accepts(chosen[place])
        ]
        if refused:
            # One copy for all of them: every look at a device's value waits for the device.
            on_host_RV = logits_BV[[place for place, _ in refused]].cpu()
            for logits_V, (place, matcher) in zip(on_host_RV, refused, strict=True):
                chosen[place] = matcher.choose(logits_V, chosen[place])
        for row, token in zip(rows, chosen, strict=True):
            if token not in self._ends:
                row.tokens.append(token)
            if token in self._ends or len(row.tokens) == self._limit:
                self._finish(row, finished=token in self._ends)

    def _finish(self, row: SlotRow, *, finished: bool) -> None:
        self._results[row.prompt] = Generated(tokens=tuple(row.tokens), finished=finished)
        slot = next(slot for slot, other in enumerate(self.rows) if other is row)
        last = self.rows.pop()
        if last is not row:
            self._store.move(len(self.rows), slot)
            self.rows[slot] = last
        if self._progress:
            self._progress(len(self._results), len(self.prompts))


def _end_tokens(session: Session) -> frozenset[int]:
    """The tokenizer's end token, and what else the backbone's own configuration ends at."""
    also = session.model.generation_config.eos_token_id
    listed = also if isinstance(also, list) else [] if also is None else [also]
    return frozenset([session.tokenizer.eos_token_id, *listed])
