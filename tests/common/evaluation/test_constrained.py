"""Constrained choice against masking always, and what happens without llguidance."""

import importlib.util

import pytest
import torch
from llguidance import LLMatcher

from common.errors import UserError
from common.evaluation.constrained import answer_grammar
from common.evaluation.generate import generate
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import open_session
from common.text.prompts import parse_answer


@pytest.fixture(scope="module")
def session():
    return open_session(resolve_backbone("tiny"), AdapterSpec(rank=4), device="cpu", dtype="fp32")


def test_only_the_likeliest_token_that_continues_the_answer_is_chosen(session):
    """Against a slow search: the first token, by falling logit, that a fresh matcher accepts."""
    generator = torch.Generator().manual_seed(0)
    matcher = answer_grammar(session)(0)
    new = answer_grammar(session)
    text: list[int] = []
    kept = 0
    for _ in range(12):
        logits = torch.randn(1024, generator=generator)
        preferred = int(logits.argmax())
        chosen = matcher.choose(logits, preferred)
        kept += chosen == preferred
        for candidate in logits.argsort(descending=True).tolist():
            replay = new(0)._matcher
            assert isinstance(replay, LLMatcher)
            assert replay.consume_tokens(text) if text else True
            if candidate < len(session.tokenizer) and replay.try_consume_tokens([candidate]):
                break
        assert chosen == candidate
        if chosen == session.tokenizer.eos_token_id:
            break
        text.append(chosen)
    assert 0 < kept < 12


def test_random_answers_parse(session):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 900, (5,), generator=generator).tolist() for _ in range(6)]
    answers = generate(
        session, prompts, max_new_tokens=30, batch_size=3, matcher=answer_grammar(session)
    )
    for answer in answers:
        assert parse_answer(session.tokenizer.decode(list(answer.tokens)).rstrip("\n -"))
    free = generate(session, prompts, max_new_tokens=30, batch_size=3)
    assert all(parse_answer(session.tokenizer.decode(list(a.tokens))) is None for a in free)


def test_without_llguidance_the_fix_is_named(session, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'llguidance"):
        answer_grammar(session)
