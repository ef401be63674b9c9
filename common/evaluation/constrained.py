"""Decoding under the answer's grammar with llguidance: every finished answer parses.

The model's own choice is kept wherever the grammar allows it; only a refused one costs a mask over
the vocabulary. That gives the same tokens as masking always, since the argmax over the allowed
tokens is the argmax over all when that one is allowed.

Shapes: V vocabulary.
"""

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.evaluation.slot_generation import Matcher
from common.model.session import Session
from common.provenance import pip_install
from common.text.prompts import ANSWER_GRAMMAR

if TYPE_CHECKING:
    from llguidance import LLMatcher


class _AnswerMatcher:
    """One sequence's place in the grammar."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def accepts(self, preferred: int) -> bool:
        """Move on by a token, if the grammar allows it."""
        return bool(self._matcher.try_consume_tokens([preferred]) == 1)

    def choose(self, logits_V: Tensor, preferred: int) -> int:
        """Return the likeliest token that the grammar allows, and move on by it."""
        if self.accepts(preferred):
            return preferred
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits_V)].astype(bool)
        refused_V = torch.ones(len(logits_V), dtype=torch.bool)
        refused_V[: len(allowed)] = torch.from_numpy(~allowed)
        token = int(logits_V.masked_fill(refused_V, -torch.inf).argmax())
        self._matcher.consume_token(token)
        return token


def require_llguidance() -> None:
    """Check that answers can be constrained here.

    Raises:
        UserError: If llguidance is not installed.
    """
    if importlib.util.find_spec("llguidance") is None:
        raise UserError(
            "evaluation.decoding=grammar needs the package llguidance",
            fix=f"{pip_install('llguidance')}, or set evaluation.decoding to formulary",
        )


def answer_grammar(session: Session) -> Callable[[int], Matcher]:
    """Return what makes a matcher for each answer; all prompts have the same grammar.

    Raises:
        UserError: If llguidance is not installed, or cannot read the backbone's tokenizer.
    """
    require_llguidance()
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    try:
        tokenizer = from_tokenizer(
            session.tokenizer,
            # A head may be wider than the tokenizer: the tokens beyond are known, and refused.
            n_vocab=session.spec.shape.vocabulary,
            eos_token=session.tokenizer.eos_token_id,
        )
    except (ValueError, AttributeError, AssertionError) as error:
        raise UserError(
            f"evaluation.decoding=grammar: llguidance cannot read this tokenizer ({error})",
            fix="set evaluation.decoding to greedy or formulary",
        ) from None
    grammar = LLMatcher.grammar_from_lark(ANSWER_GRAMMAR)
    first = LLMatcher(tokenizer, grammar)
    return lambda prompt: _AnswerMatcher(first.deep_copy())
