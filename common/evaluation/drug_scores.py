"""Every drug of a formulary, scored after a prompt: one pass over the prompt, few over the trie.

A score is the probability that the model names the drug first, where only the formulary's names can
be said: at each token that tells names apart, the model's distribution over the tokens that go on.
That is what formulary decoding would say first if it sampled. A model that is trained on lists in
random order names each drug first in proportion to how likely it is in the list at all.

Tokens that tell no names apart have probability one, so only the shared beginnings of names are
run: each once, all attending to the kept keys and values of the prompt and to their own ancestors.

Shapes: N names, P tokens of the prompt, C tokens of a pass, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.evaluation.drug_trie import ROOT, DrugTrie

if TYPE_CHECKING:
    from common.model.session import Session

PASS_TOKENS = 512
"""Shared tokens that one pass scores; it runs their ancestors beside them."""


@dataclass(frozen=True, kw_only=True)
class TriePass:
    """Some shared beginnings of names, run together."""

    tokens: Tensor
    """[C]"""
    depths: Tensor
    """[C] tokens from the header to each, from 1 on."""
    seen: Tensor
    """[C, C] bool: each sees itself and its ancestors."""
    edge_rows: Tensor
    """Row of each edge's parent in this pass."""
    edges: slice
    """Which edges of the plan are scored here."""


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """What one trie needs: made once, used for every prompt."""

    trie: DrugTrie
    passes: tuple[TriePass, ...]
    edge_parents: NDArray[np.intp]
    """Parent of every edge, each parent's edges side by side; the root's come first."""
    edge_children: NDArray[np.intp]
    edge_tokens: Tensor
    tips: tuple[tuple[int, ...], ...]
    """For each name, the first nodes that are its alone."""


def score_plan(trie: DrugTrie, *, pass_tokens: int = PASS_TOKENS) -> ScorePlan:
    """Lay out the passes over a trie."""
    alone = _names_alone(trie)
    tips: list[list[int]] = [[] for _ in trie.names]
    for node, name in enumerate(alone):
        if name is not None and (node == ROOT or alone[trie.parents[node]] is None):
            tips[name].append(node)
    shared = [node for node in _depth_first(trie, alone) if alone[node] is None]
    edges = [(node, child) for node in shared for child in trie.children[node].values()]
    counts = np.array([len(trie.children[node]) for node in shared], dtype=np.intp)
    starts = np.concatenate([[0], counts.cumsum()]).tolist()
    passes = [
        _pass(trie, shared[first : first + pass_tokens], starts[first : first + pass_tokens + 1])
        for first in range(1, len(shared), pass_tokens)
    ]
    return ScorePlan(
        trie=trie,
        passes=tuple(passes),
        edge_parents=np.array([parent for parent, _ in edges], dtype=np.intp),
        edge_children=np.array([child for _, child in edges], dtype=np.intp),
        edge_tokens=torch.tensor([trie.tokens[child] for _, child in edges], dtype=torch.int64),
        tips=tuple(map(tuple, tips)),
    )


def drug_scores(
    session: "Session",
    prompts: Sequence[Sequence[int]],
    plans: Callable[[int], ScorePlan],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[NDArray[np.float64]]:
    """Score the formulary's names after each prompt.

    Args:
        session: Backbone with its adapter.
        prompts: Token ids up to where the answer starts.
        plans: Place of a prompt -> plan of its hospital's formulary.
        progress: Called after every prompt with (done, all).

    Returns:
        For each prompt [N] probabilities in the order of its trie's names; they add up to 1.
    """
    scores = []
    with torch.inference_mode(), session.adapter.merged():
        for place, prompt in enumerate(prompts):
            plan = plans(place)
            scores.append(_probabilities(plan, _edge_logits(session, prompt, plan)))
            if progress:
                progress(place + 1, len(prompts))
    return scores


def _edge_logits(session: "Session", prompt: Sequence[int], plan: ScorePlan) -> NDArray[np.float64]:
    """Return the logit of every edge's token after its parent.

    The first beginnings of names go with the prompt, since a pass of few tokens is mostly the
    reading of weights.
    """
    # transformers is imported when something is scored, not when help is asked for.
    from transformers import DynamicCache

    from common.evaluation.slots import cache_argument

    device, model = session.torch_device, session.model.model
    cache = DynamicCache()

    def run(ids_C: Tensor, **inputs: Tensor) -> Tensor:
        named: dict[str, Any] = {name: one.to(device) for name, one in inputs.items()}
        named[cache_argument(model)] = cache
        hidden: Tensor = model(
            input_ids=ids_C[None].to(device), use_cache=True, **named
        ).last_hidden_state
        return hidden[0]

    ids_P = torch.tensor([*prompt, *plan.trie.header])
    length = len(ids_P)
    logits = torch.empty(len(plan.edge_tokens), dtype=torch.float32)
    weight_VD = session.model.lm_head.weight
    tokens = plan.edge_tokens.to(device)
    if not plan.passes:
        last_D = run(ids_P)[-1]
    for number, one in enumerate(plan.passes):
        ids_C, positions_C = one.tokens, one.depths + (length - 1)
        seen_CL = torch.cat(
            [torch.ones(len(one.tokens), length, dtype=torch.bool), one.seen], dim=1
        )
        if number == 0:
            ids_C = torch.cat([ids_P, ids_C])
            positions_C = torch.cat([torch.arange(length), positions_C])
            causal_PL = torch.ones(length, seen_CL.shape[1], dtype=torch.bool).tril()
            seen_CL = torch.cat([causal_PL, seen_CL])
        hidden_CD = run(
            ids_C,
            position_ids=positions_C[None],
            # transformers hands a 4-D mask on as it is.
            attention_mask=seen_CL[None, None],
        )
        if number == 0:
            last_D, hidden_CD = hidden_CD[length - 1], hidden_CD[length:]
        rows_ED = hidden_CD[one.edge_rows.to(device)]
        logits[one.edges] = (rows_ED * weight_VD[tokens[one.edges]]).float().sum(-1).cpu()
        cache.crop(-len(one.tokens))
    roots = slice(0, int((plan.edge_parents == ROOT).sum()))
    logits[roots] = (weight_VD[tokens[roots]] @ last_D).float().cpu()
    return logits.double().numpy()


def _probabilities(plan: ScorePlan, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    logs = np.zeros(len(plan.trie.parents))
    if len(logits):
        firsts = np.flatnonzero(np.diff(plan.edge_parents, prepend=-1))
        sizes = np.diff([*firsts, len(logits)])
        highest = np.repeat(np.maximum.reduceat(logits, firsts), sizes)
        totals = np.repeat(np.add.reduceat(np.exp(logits - highest), firsts), sizes)
        own = logits - highest - np.log(totals)
        # A parent stands before its children, in the order of the edges too.
        for parent, child, log in zip(
            plan.edge_parents.tolist(), plan.edge_children.tolist(), own.tolist(), strict=True
        ):
            logs[child] = logs[parent] + log
    return np.array([np.exp(logs[list(nodes)]).sum() for nodes in plan.tips])


def _names_alone(trie: DrugTrie) -> list[int | None]:
    """Return for each node the one name at or below it; None where there are several."""
    unknown = -1
    alone: list[int | None] = [unknown] * len(trie.parents)
    for leaf, name in trie.names_of_leaves.items():
        alone[leaf] = name
    # Children come after their parents.
    for node in range(len(alone) - 1, ROOT, -1):
        parent = trie.parents[node]
        if alone[parent] == unknown:
            alone[parent] = alone[node]
        elif alone[parent] != alone[node]:
            alone[parent] = None
    return alone


def _depth_first(trie: DrugTrie, alone: Sequence[int | None]) -> Iterator[int]:
    """Yield nodes so that neighbours share ancestors: then a pass repeats few of them."""
    waiting = [ROOT]
    while waiting:
        node = waiting.pop()
        yield node
        if alone[node] is None:
            waiting.extend(reversed(list(trie.children[node].values())))


def _pass(trie: DrugTrie, nodes: Sequence[int], starts: Sequence[int]) -> TriePass:
    """Lay out one pass: the nodes it scores, and the ancestors that they must see."""
    above = {up for node in nodes for up in trie.path(node)[1:-1]} - set(nodes)
    run = [*sorted(above), *nodes]
    rows = {node: row for row, node in enumerate(run)}
    seen = torch.zeros(len(run), len(run), dtype=torch.bool)
    paths = [trie.path(node)[:-1] for node in run]
    for row, path in enumerate(paths):
        seen[row, [rows[node] for node in path]] = True
    edge_rows = [rows[node] for node in nodes for _ in trie.children[node]]
    return TriePass(
        tokens=torch.tensor([trie.tokens[node] for node in run]),
        depths=torch.tensor([len(path) for path in paths]),
        seen=seen,
        edge_rows=torch.tensor(edge_rows, dtype=torch.int64),
        edges=slice(starts[0], starts[0] + len(edge_rows)),
    )
