"""Scored lists against a slow reference: every name enumerated, one forward pass for each."""

import numpy as np
import pytest
import torch

from common.evaluation import drug_scores as scored
from common.evaluation.drug_scores import drug_scores, score_plan
from common.evaluation.drug_trie import drug_trie
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import open_session
from common.text.prompts import render_answer

NAMES = (
    *("Aspirin", "Insulin", "Insulin Lispro", "Insulin Glargine", "Insulin (Regular)", "Heparin"),
    *("Heparin Sodium", "Metoprolol Tartrate", "Metoprolol Succinate", "- odd\nname", "Senna"),
)


@pytest.fixture(scope="module")
def session():
    opened = open_session(
        resolve_backbone("tiny"), AdapterSpec(rank=4, alpha=8.0), device="cpu", dtype="fp32"
    )
    noise = torch.randn(opened.adapter.flat.shape, generator=torch.Generator().manual_seed(0))
    opened.adapter.flat.copy_(0.3 * noise)
    return opened


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 900, (n,), generator=generator).tolist() for n in (3, 17, 40)]


def written(tokenizer, names):
    """Tokens of each name, going on and ending, from whole texts."""
    head = tokenizer("Drugs:\n-", add_special_tokens=False)["input_ids"]
    ways = {}
    for name in names:
        ended = tokenizer(render_answer([name]), add_special_tokens=False)["input_ids"]
        onward = tokenizer(render_answer([name]) + "\n-", add_special_tokens=False)["input_ids"]
        ways[name] = [onward[len(head) :], [*ended[len(head) :], tokenizer.eos_token_id]]
    return head, ways


def slow_scores(session, prompt, names):
    """One forward pass over prompt and name for each way to write each name."""
    head, ways = written(session.tokenizer, names)
    everything = [tuple(way) for both in ways.values() for way in both]
    scores = []
    with torch.no_grad():
        for name in names:
            total = 0.0
            for way in ways[name]:
                ids = torch.tensor([[*prompt, *head, *way]])
                logits = session.model(input_ids=ids, use_cache=False).logits[0].double()
                log = 0.0
                for place, token in enumerate(way):
                    allowed = sorted(
                        {w[place] for w in everything if w[:place] == tuple(way[:place])}
                    )
                    at = logits[len(prompt) + len(head) - 1 + place]
                    log += float(at[token] - at[allowed].logsumexp(0))
                total += np.exp(log)
            scores.append(total)
    return np.array(scores)


@pytest.mark.parametrize("pass_tokens", [1, 3, 512])
def test_scores_are_those_of_one_pass_for_each_name(session, prompts, pass_tokens):
    plan = score_plan(drug_trie(NAMES, session.tokenizer), pass_tokens=pass_tokens)
    found = drug_scores(session, prompts, lambda place: plan)
    for prompt, scores in zip(prompts, found, strict=True):
        np.testing.assert_allclose(scores, slow_scores(session, prompt, NAMES), rtol=2e-5)
        assert scores.sum() == pytest.approx(1)
    assert not np.allclose(found[0], found[1], rtol=0.05)


def test_a_patient_s_scores_do_not_know_who_else_is_scored(session, prompts):
    plan = score_plan(drug_trie(NAMES, session.tokenizer))
    together = drug_scores(session, prompts, lambda place: plan)
    for prompt, scores in zip(prompts, together, strict=True):
        (alone,) = drug_scores(session, [prompt], lambda place: plan)
        assert (alone == scores).all()


def test_the_adapter_decides_the_scores(session, prompts):
    plan = score_plan(drug_trie(NAMES, session.tokenizer))
    (before,) = drug_scores(session, prompts[:1], lambda place: plan)
    kept = session.adapter.flat.clone()
    session.adapter.flat.zero_()
    (without,) = drug_scores(session, prompts[:1], lambda place: plan)
    session.adapter.flat.copy_(kept)
    assert not np.allclose(before, without, rtol=0.05)


def test_each_hospital_is_scored_over_its_own_names(session, prompts):
    plans = [
        score_plan(drug_trie(names, session.tokenizer)) for names in (NAMES, NAMES[:4], NAMES[:1])
    ]
    found = drug_scores(session, prompts, plans.__getitem__)
    assert [len(scores) for scores in found] == [11, 4, 1]
    assert found[2].tolist() == [1.0]
    np.testing.assert_allclose(found[1], slow_scores(session, prompts[1], NAMES[:4]), rtol=2e-5)


def test_shared_beginnings_are_run_once_and_sure_endings_never(session, prompts, monkeypatch):
    """Counted: the prompt and the tokens that more than one name begins with, in one pass."""
    run: list[int] = []
    forward = session.model.model.forward

    def counting(*args, **kwargs):
        run.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(session.model.model, "forward", counting)
    trie = drug_trie(NAMES, session.tokenizer)
    drug_scores(session, prompts[:1], lambda place: score_plan(trie))
    head, ways = written(session.tokenizer, NAMES)
    begun: dict[tuple[int, ...], set[str]] = {}
    for name, both in ways.items():
        for way in both:
            for place in range(1, len(way) + 1):
                begun.setdefault(tuple(way[:place]), set()).add(name)
    shared = sum(len(names) > 1 for names in begun.values())
    assert run == [len(prompts[0]) + len(head) + shared]
    assert scored.PASS_TOKENS > shared > 0
