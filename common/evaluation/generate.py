"""Greedy continuations of prompts: recorded on a GPU, plain elsewhere."""

from collections.abc import Callable, Sequence

import torch

from common.evaluation.slot_generation import Generated, Matcher, SlotGeneration
from common.model.session import Session


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    matcher: Callable[[int], Matcher] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Continue every prompt greedily until its end token or ``max_new_tokens``.

    Deterministic. The adapter is folded into the weights meanwhile.

    Args:
        session: Backbone and adapter.
        prompts: Token ids, each at least one.
        max_new_tokens: Longest continuation.
        batch_size: Sequences that are continued together.
        matcher: Makes what constrains the answer to one prompt, by the prompt's place;
            unconstrained when None.
        progress: Called with (finished, all) whenever a sequence is finished.

    Returns:
        The continuations in the order of the prompts.
    """
    if not prompts:
        return []
    from common.evaluation import decode_graph  # with transformers, as late as possible

    how = decode_graph.GraphGeneration if decode_graph.supported(session) else SlotGeneration
    with torch.inference_mode(), session.adapter.merged():
        return how(session, prompts, max_new_tokens, batch_size, matcher, progress).run()
