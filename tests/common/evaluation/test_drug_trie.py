"""Formulary decoding against masking always, and lists against their text."""

import itertools

import pytest
import torch

from common.errors import UserError
from common.evaluation.drug_trie import ROOT, FormularyMatcher, drug_trie, require_room
from common.evaluation.generate import generate
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import open_session
from common.text.prompts import parse_answer, render_answer

NAMES = ("Aspirin", "Insulin", "Insulin Lispro", "Insulin (Regular)", "- odd\nname", "Heparin 5%)")


@pytest.fixture(scope="module")
def session():
    return open_session(resolve_backbone("tiny"), AdapterSpec(rank=4), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def trie(session):
    return drug_trie(NAMES, session.tokenizer)


def all_lists(tokenizer, longest):
    """Every list without repeats, as the tokens of its whole text; no trie is asked."""
    end = tokenizer.eos_token_id
    return {
        (*tokenizer(render_answer(names), add_special_tokens=False)["input_ids"], end)
        for count in range(1, longest + 1)
        for names in itertools.permutations(NAMES, count)
    }


def test_exactly_the_lists_of_distinct_names_can_be_said(session, trie):
    """Against all 1,956 lists of six names, tokenised whole: at each place the likeliest token
    that some list goes on with is chosen, whatever the logits are."""
    lists = all_lists(session.tokenizer, len(NAMES))
    assert len(lists) == 1956
    following: dict[tuple[int, ...], set[int]] = {}
    for ids in lists:
        for place, token in enumerate(ids):
            following.setdefault(ids[:place], set()).add(token)
    generator = torch.Generator().manual_seed(0)
    refused, lengths = 0, set()
    for _ in range(40):
        matcher = FormularyMatcher(trie)
        said: tuple[int, ...] = ()
        while said not in lists:
            logits = torch.randn(1024, generator=generator)
            logits[session.tokenizer.eos_token_id] -= 2.0  # else most lists hold one drug
            preferred = int(logits.argmax())
            allowed = sorted(following[said])
            chosen = matcher.choose(logits, preferred)
            assert chosen == max(allowed, key=lambda token: float(logits[token]))
            refused += chosen != preferred
            said = (*said, chosen)
        lengths.add(len(parse_answer(session.tokenizer.decode(said, skip_special_tokens=True))))
    assert refused > 40
    assert {1, 6} <= lengths


def test_what_the_model_prefers_is_kept_where_a_name_allows_it(session, trie):
    matcher = FormularyMatcher(trie)
    logits = torch.zeros(1024)
    ids = session.tokenizer(render_answer(["Insulin", "Aspirin"]), add_special_tokens=False)
    for token in (*ids["input_ids"], session.tokenizer.eos_token_id):
        assert matcher.choose(logits, token) == token


def test_generated_lists_hold_names_of_the_formulary_once(session, trie):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 900, (5,), generator=generator).tolist() for _ in range(8)]
    answers = generate(
        session,
        prompts,
        max_new_tokens=120,
        batch_size=3,
        matcher=lambda place: FormularyMatcher(trie),
    )
    for answer in answers:
        assert answer.finished
        drugs = parse_answer(session.tokenizer.decode(list(answer.tokens)))
        assert drugs
        assert set(drugs) <= set(NAMES)
        assert len(drugs) == len(set(drugs))


def test_one_name_gives_one_list(session):
    alone = drug_trie(["Aspirin"], session.tokenizer)
    (answer,) = generate(
        session,
        [[5]],
        max_new_tokens=40,
        batch_size=1,
        matcher=lambda place: FormularyMatcher(alone),
    )
    assert session.tokenizer.decode(list(answer.tokens)) == "Drugs:\n- Aspirin"


def test_few_logits_are_looked_at(session):
    """What a refused choice costs: the tokens that go on, not the vocabulary."""
    names = [f"{first} {second}" for first in ("Aspirin", "Heparin") for second in "abcdefgh"]
    trie = drug_trie(names, session.tokenizer)
    looked: list[int] = []

    class Logits(torch.Tensor):
        def __getitem__(self, places):
            looked.append(len(places))
            return torch.zeros(len(places))

    matcher = FormularyMatcher(trie)
    for _ in range(len(trie.header) + 3):
        matcher.choose(torch.zeros(1024).as_subclass(Logits), -1)
    assert looked
    assert max(looked) <= 8


def test_a_limit_that_would_cut_the_only_name_is_refused(trie):
    longest = trie.longest_answer_of_one
    require_room(trie, longest)
    with pytest.raises(UserError, match=f"allowed: {longest} or more"):
        require_room(trie, longest - 1)


def test_a_tokenizer_that_merges_lines_is_refused(session):
    class Merging:
        eos_token_id = 1

        def __call__(self, texts, add_special_tokens):
            # The number of lines changes every token: no name has tokens of its own.
            return {"input_ids": [[len(text.split("\n")), *text.encode()] for text in texts]}

    with pytest.raises(UserError, match="tokenizer merges"):
        drug_trie(NAMES, Merging())


def test_a_tokenizer_that_writes_two_names_alike_is_refused(session):
    class Folding:
        eos_token_id = 1

        def __call__(self, texts, add_special_tokens):
            return session.tokenizer([text.lower() for text in texts], add_special_tokens=False)

    assert drug_trie(["Aspirin", "Senna"], Folding())
    with pytest.raises(UserError, match="two names alike"):
        drug_trie(["Aspirin", "aspirin"], Folding())


def test_the_trie_shares_beginnings(trie, session):
    assert trie.leaves_below[ROOT] == 2 * len(NAMES)
    texts = {
        "".join(session.tokenizer.decode([trie.tokens[n]]) for n in reversed(trie.path(leaf)[:-1]))
        for leaf in trie.ending
    }
    assert texts == {f" {line[2:]}<|im_end|>" for line in render_answer(NAMES).split("\n")[1:]}
