"""Batched generation against transformers' own generate, one prompt at a time."""

import inspect
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers

from common.evaluation import decode_graph
from common.evaluation.generate import generate
from common.evaluation.slot_generation import Generated, SlotGeneration
from common.evaluation.slots import SlotCache, cache_argument
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import load_model, resolve_backbone
from common.model.session import Session, open_session

LIMIT = 24


@pytest.fixture(scope="module")
def session():
    """The tiny Llama in fp32 with a B that matters, ending now and then."""
    spec = resolve_backbone("tiny")
    opened = open_session(spec, AdapterSpec(rank=4, alpha=8.0), device="cpu", dtype="fp32")
    noise = torch.randn(opened.adapter.flat.shape, generator=torch.Generator().manual_seed(0))
    opened.adapter.flat.copy_(0.1 * noise)
    # An untrained model never says its end token: lift it until answers end at mixed lengths.
    direction = torch.randn(64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        opened.model.lm_head.weight[opened.tokenizer.eos_token_id] = 3.2 * direction / 8
    return opened


@pytest.fixture(scope="module")
def prompts(session):
    """Prompts of mixed lengths; every third holds the end (and padding) token inside."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for place in range(13):
        length = int(torch.randint(1, 60, (1,), generator=generator))
        ids = torch.randint(2, 1024, (length,), generator=generator).tolist()
        if place % 3 == 0:
            ids = [ids[0], session.tokenizer.eos_token_id, *ids]
        made.append(ids)
    return made


def one_by_one(session, prompts):
    """transformers' greedy generation on its own copy with PEFT-free merged weights."""
    model = load_model(session.spec, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.copy_(session.model.lm_head.weight)
        for module in session.adapter.modules:
            update = session.adapter.spec.scale * module.lora_B @ module.lora_A
            model.get_submodule(module.key).weight.add_(update)
    results = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=LIMIT,
            do_sample=False,
            eos_token_id=session.tokenizer.eos_token_id,
            pad_token_id=session.tokenizer.eos_token_id,
        )[0, len(ids) :].tolist()
        finished = out[-1] == session.tokenizer.eos_token_id
        results.append(Generated(tokens=tuple(out[:-1] if finished else out), finished=finished))
    return results


WAYS = ["packed prompts", "prompt by prompt", "steps as on a GPU"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """How ``generate`` works; a GPU's way runs here without recording its steps."""
    on_gpu, passes = request.param == WAYS[2], []
    monkeypatch.setattr(decode_graph, "supported", lambda session: on_gpu)
    if request.param == WAYS[1]:  # as with a Llama that our layers do not compute
        monkeypatch.setattr(Session, "lean", False)
    # Some passes hold several prompts, some one; columns fall into several buckets.
    for kind in (SlotGeneration, decode_graph.GraphGeneration):
        monkeypatch.setattr(kind, "prefill_tokens", 90)
    monkeypatch.setattr(decode_graph, "COLUMNS", 16)
    prefill = SlotGeneration._prefill
    monkeypatch.setattr(
        SlotGeneration, "_prefill", lambda self, p: passes.append(len(p)) or prefill(self, p)
    )
    return request.param, passes


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_tokens_equal_transformers_one_by_one(session, prompts, batch_size, way):
    expected = one_by_one(session, prompts)
    lengths = {len(answer.tokens) for answer in expected}
    assert {answer.finished for answer in expected} == {True, False}
    assert len(lengths) > 3
    seen = []
    ours = generate(
        session,
        prompts,
        max_new_tokens=LIMIT,
        batch_size=batch_size,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert ours == expected
    name, passes = way
    assert sum(passes) == (0 if name == WAYS[1] else len(prompts))
    assert batch_size == 1 or not passes or max(passes) > 1
    assert seen == [(done, len(prompts)) for done in range(1, len(prompts) + 1)]


def test_the_adapter_speaks_and_is_left_as_it_was(session, prompts):
    trained = generate(session, prompts, max_new_tokens=LIMIT, batch_size=4)
    b = session.adapter.state()
    session.adapter.flat.zero_()
    untrained = generate(session, prompts, max_new_tokens=LIMIT, batch_size=4)
    session.adapter.load(b)
    assert trained != untrained
    assert all(module.merged_OD is None for module in session.adapter.modules)
    assert not torch.is_inference(session.adapter.flat)
    assert generate(session, prompts, max_new_tokens=LIMIT, batch_size=4) == trained


def test_a_matcher_chooses_in_place_of_the_argmax(session, prompts, way, monkeypatch):
    copies, steps = [], 0

    class OnlyEven:
        def __init__(self, prompt):
            assert 0 <= prompt < len(prompts)

        def accepts(self, preferred):
            return preferred % 2 == 0

        def choose(self, logits_V, preferred):
            allowed = logits_V.clone()
            allowed[1::2] = -torch.inf
            return int(allowed.argmax())

    to_host, taken = torch.Tensor.cpu, SlotGeneration.take

    def counted(self, rows, logits_BV):
        nonlocal steps
        steps += 1
        taken(self, rows, logits_BV)

    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copies.append(len(t)) or to_host(t))
    monkeypatch.setattr(SlotGeneration, "take", counted)
    answers = generate(session, prompts, max_new_tokens=8, batch_size=4, matcher=OnlyEven)
    # A step looks at the device once, however many rows are refused.
    assert len(copies) <= steps
    assert max(copies) > 1
    tokens = [token for answer in answers for token in answer.tokens]
    assert len(tokens) == 8 * len(prompts)
    assert all(token % 2 == 0 for token in tokens)


def test_no_prompts_no_answers(session):
    assert generate(session, [], max_new_tokens=8, batch_size=4) == []


def test_nothing_that_transformers_deprecates_is_used(session, prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(session, prompts, max_new_tokens=4, batch_size=4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_forward_gives_it(name):
    """``past_key_values`` at the low end of the range, ``cache`` from 5.24 on."""
    forward = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)])
    model = SimpleNamespace(forward=Mock(__signature__=forward))
    assert cache_argument(model) == name


def test_a_slot_holds_what_transformers_own_cache_holds(session, prompts):
    """A prompt in slot 1, then a token: keys and values against a ``DynamicCache``, to the bit."""
    backbone = session.model.model
    prompt, like = torch.tensor([prompts[0]]), backbone.embed_tokens.weight
    columns = prompt.shape[1] + 1
    ours = SlotCache(session.spec.shape, slots=2, columns=columns, like=like)
    theirs = transformers.DynamicCache()
    assert isinstance(ours, transformers.Cache)
    name, token = cache_argument(backbone), torch.tensor([[7]])
    with torch.inference_mode():
        ours.expect_prompt(1)
        assert ours.get_seq_length() == 0
        backbone(input_ids=prompt, use_cache=True, **{name: ours})
        assert ours.get_seq_length() == prompt.shape[1]
        backbone(input_ids=prompt, use_cache=True, **{name: theirs})
        ours.move(1, 0)
        ours.expect_tokens(torch.tensor([prompt.shape[1]]), prompt.shape[1])
        backbone(input_ids=token, use_cache=True, **{name: ours})
        backbone(input_ids=token, use_cache=True, **{name: theirs})
    for here, there in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(here.keys[:1], there.keys)
        assert torch.equal(here.values[:1], there.values)
        assert torch.equal(here.keys[1, :, :-1], there.keys[0, :, :-1])
