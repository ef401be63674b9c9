"""Drug names as a trie of tokens: what a list may say next, and where names share a beginning.

A list is a header, then one line a drug. A name is followed either by the beginning of the next
line or by the answer's end, and tokenizers may merge a name's last character with what follows, so
every name has two paths through the trie: one that goes on and one that ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import UserError
from common.text.prompts import NEXT_ITEM, render_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = 0


@dataclass(frozen=True, kw_only=True)
class DrugTrie:
    """All ways to write one more drug. Node 0 is where a name starts."""

    names: tuple[str, ...]
    header: tuple[int, ...]
    """Tokens before the first name."""
    children: tuple[Mapping[int, int], ...]
    """For each node: token -> node, by ascending token."""
    parents: tuple[int, ...]
    """For each node; -1 for the root."""
    tokens: tuple[int, ...]
    """For each node, the token that leads to it; -1 for the root."""
    going_on: tuple[int, ...]
    """For each name, the leaf after which the next name starts."""
    ending: tuple[int, ...]
    """For each name, the leaf that ends the answer."""

    @cached_property
    def names_of_leaves(self) -> Mapping[int, int]:
        """Leaf -> name."""
        return {
            leaf: name
            for leaves in (self.going_on, self.ending)
            for name, leaf in enumerate(leaves)
        }

    @cached_property
    def leaves_below(self) -> tuple[int, ...]:
        """For each node, how many leaves are at or below it."""
        counts = [0] * len(self.parents)
        for leaf in self.names_of_leaves:
            for node in self.path(leaf):
                counts[node] += 1
        return tuple(counts)

    @property
    def longest_answer_of_one(self) -> int:
        """Tokens of the longest answer with one drug, its end included."""
        return len(self.header) + max(len(self.path(leaf)) - 1 for leaf in self.ending)

    def path(self, node: int) -> list[int]:
        """Return the nodes from one up to the root, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes


def drug_trie(names: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> DrugTrie:
    """Build the trie of distinct drug names.

    Args:
        names: At least one, none empty.
        tokenizer: The backbone's.

    Raises:
        UserError: If this tokenizer does not write a list line by line, so that no trie of single
            names says how a list is written.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError("a trie needs distinct names")
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    lists = [render_answer([name]) for name in names]
    (header,) = _tokens(tokenizer, [render_answer([]) + NEXT_ITEM])
    ended = [ids[len(header) :] for ids in _headed(tokenizer, lists, header)]
    onward = [
        ids[len(header) :]
        for ids in _headed(tokenizer, [text + NEXT_ITEM for text in lists], header)
    ]
    neighbours = [(place, (place + 1) % len(names)) for place in range(len(names))]
    pairs = _tokens(tokenizer, [render_answer([names[a], names[b]]) for a, b in neighbours])
    if any(
        pair != header + onward[a] + ended[b]
        for (a, b), pair in zip(neighbours, pairs, strict=True)
    ):
        raise _not_by_lines()
    children: list[dict[int, int]] = [{}]
    parents, tokens = [-1], [-1]

    def leaf(path: Sequence[int]) -> int:
        node = ROOT
        for token in path:
            if token not in children[node]:
                children[node][token] = len(parents)
                parents.append(node)
                tokens.append(token)
                children.append({})
            node = children[node][token]
        return node

    going_on = tuple(leaf(path) for path in onward)
    ending = tuple(leaf([*path, end]) for path in ended)
    leaves = {*going_on, *ending}
    # A tokenizer that folds characters may write two names alike.
    if any(children[node] for node in leaves) or len(leaves) < 2 * len(names):
        raise _not_by_lines()
    return DrugTrie(
        names=tuple(names),
        header=tuple(header),
        children=tuple(dict(sorted(node.items())) for node in children),
        parents=tuple(parents),
        tokens=tuple(tokens),
        going_on=going_on,
        ending=ending,
    )


class FormularyMatcher:
    """One answer's place in the trie: names of the formulary, each at most once.

    The model's own choice is kept wherever it is allowed; only a refused one costs a look at the
    logits of the few tokens that are. That gives the same tokens as masking always.
    """

    def __init__(self, trie: DrugTrie) -> None:
        self._trie = trie
        self._header = list(reversed(trie.header))
        self._node = ROOT
        self._used: dict[int, int] = {}
        self._left = len(trie.names)
        self._given: set[int] = set()
        if self._left == 1:
            self._use(trie.going_on[0])

    def accepts(self, preferred: int) -> bool:
        """Move on by a token, if a name of the formulary allows it."""
        if self._header:
            allowed = preferred == self._header[-1]
        else:
            allowed = self._open(self._trie.children[self._node].get(preferred))
        if allowed:
            self._move(preferred)
        return allowed

    def choose(self, logits_V: Tensor, preferred: int) -> int:
        """Return the likeliest token that a name of the formulary allows, and move on by it."""
        if self.accepts(preferred):
            return preferred
        if self._header:
            token = self._header[-1]
        else:
            following = self._trie.children[self._node]
            allowed = [token for token, node in following.items() if self._open(node)]
            token = allowed[0]
            if len(allowed) > 1:
                token = allowed[int(logits_V[torch.tensor(allowed)].argmax())]
        self._move(token)
        return token

    def _move(self, token: int) -> None:
        if self._header:
            self._header.pop()
            return
        self._node = self._trie.children[self._node][token]
        if not self._trie.children[self._node]:
            self._finish_name(self._trie.names_of_leaves[self._node])

    def _open(self, node: int | None) -> bool:
        return node is not None and self._trie.leaves_below[node] > self._used.get(node, 0)

    def _use(self, leaf: int) -> None:
        for node in self._trie.path(leaf):
            self._used[node] = self._used.get(node, 0) + 1

    def _finish_name(self, name: int) -> None:
        trie = self._trie
        self._node = ROOT
        self._given.add(name)
        self._left -= 1
        self._use(trie.ending[name])
        if self._left:
            self._use(trie.going_on[name])
        if self._left == 1:
            # After the last name nothing can follow but the end.
            (last,) = set(range(len(trie.names))) - self._given
            self._use(trie.going_on[last])


def require_room(trie: DrugTrie, max_new_tokens: int) -> None:
    """Check that the longest name fits into an answer: a name that is cut is an invented one.

    Raises:
        UserError: If it does not.
    """
    needed = trie.longest_answer_of_one
    if max_new_tokens < needed:
        raise UserError(
            f"evaluation.max-new-tokens={max_new_tokens} does not hold the longest drug name",
            allowed=f"{needed} or more",
            fix=f"--set evaluation.max-new-tokens={needed}",
        )


def _headed(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], header: list[int]
) -> list[list[int]]:
    found = _tokens(tokenizer, texts)
    if any(ids[: len(header)] != header or len(ids) == len(header) for ids in found):
        raise _not_by_lines()
    return found


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _not_by_lines() -> UserError:
    return UserError(
        "model.backbone: its tokenizer merges a drug's name with its neighbours' lines or writes "
        "two names alike, so a formulary does not say what may come next",
        fix="set evaluation.decoding to grammar or greedy, and evaluation.method to generate",
    )
