"""Packed equals one by one for every kind of rotary embedding that is accepted.

Oracle: a fresh transformers Llama of the same configuration, one sequence at a time.
"""

import pytest
import torch

from common.configio import from_flat
from common.errors import UserError
from common.evaluation.generate import generate
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.kernels import rope
from common.model.kernels.rope import BY_LENGTH, FIXED
from common.model.session import open_session
from common.text.batches import Encoded, pack
from common.training.gradients import add_unit_gradients
from sim.checks.audit import audit
from sim.runs.single import single

SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [4.0 + 0.5 * i for i in range(8)]
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 64,
    },
}
LENGTHS = (40, 150, 33, 1, 90)
"""Around the 64 positions that the configurations are scaled from."""


def test_every_accepted_kind_is_played():
    assert set(KINDS) == {*FIXED, *BY_LENGTH}


def samples():
    generator = torch.Generator().manual_seed(0)
    return [
        Encoded(
            input_ids=tuple(torch.randint(2, 800, (n,), generator=generator).tolist()),
            answer_start=max(1, n // 2),
            unit=place,
        )
        for place, n in enumerate(LENGTHS)
    ]


def settings(kind):
    positions = 64 if kind in BY_LENGTH else 256
    return {"rope_parameters": dict(KINDS[kind]), "max_position_embeddings": positions}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny):
    return save_tiny(tmp_path_factory.mktemp("rope") / "llama")


@pytest.fixture
def opened(folder, set_config):
    """Open the folder with one kind of rotary embedding."""

    def session_of(kind):
        set_config(folder, **settings(kind))
        spec = resolve_backbone(str(folder), cache_dir=folder.parent / "cache")
        assert spec.rope == kind
        return open_session(spec, AdapterSpec(rank=2), device="cpu", dtype="fp32")

    return session_of


def worst_difference(session, twin) -> float:
    batch, worst = pack(samples()), 0.0
    with torch.no_grad():
        packed = session.model.lm_head(session.hidden_states(batch))
        for place, sample in enumerate(samples()):
            alone = twin()(input_ids=torch.tensor([sample.input_ids])).logits
            part = packed[batch.cu_seqlens[place] : batch.cu_seqlens[place + 1]]
            worst = max(worst, float((part - alone[0]).abs().max() / alone.abs().max()))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_one_by_one(opened, tiny_with, kind, monkeypatch):
    def twin():
        return tiny_with(**settings(kind))

    session = opened(kind)
    assert worst_difference(session, twin) < 1e-5
    assert worst_difference(session, twin) < 1e-5  # and again: no pass leaves a trace
    # the mutant: transformers' own module, which sees the pass as a whole
    monkeypatch.setattr(rope, "install", lambda model: None)
    shared = worst_difference(opened(kind), twin)
    assert (shared > 1e-3) == (kind in BY_LENGTH)


@pytest.mark.parametrize("kind", KINDS)
def test_unit_gradients_equal_one_by_one(opened, kind):
    session = opened(kind)
    units = samples()
    together = torch.zeros(len(units), session.adapter.trainable_parameters)
    add_unit_gradients(session, pack(units), range(len(units)), together)
    for place, unit in enumerate(units):
        alone = torch.zeros(1, session.adapter.trainable_parameters)
        add_unit_gradients(session, pack([unit]), [0], alone)
        assert (together[place] - alone[0]).norm() <= 2e-6 * alone.norm()


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_answers_do_not_depend_on_their_neighbours(opened, tiny_with, kind):
    session = opened(kind)
    prompts = [sample.input_ids for sample in samples()]
    together = generate(session, prompts, max_new_tokens=12, batch_size=5)
    alone = [generate(session, [p], max_new_tokens=12, batch_size=1)[0] for p in prompts]
    assert together == alone
    ids = torch.tensor([prompts[1]])
    theirs = tiny_with(**settings(kind)).generate(ids, max_new_tokens=12, do_sample=False)
    assert list(alone[1].tokens) == theirs[0, ids.shape[1] :].tolist()[: len(alone[1].tokens)]


@pytest.mark.parametrize("kind", BY_LENGTH)
@pytest.mark.parametrize("verb", [single, audit])
def test_privacy_refuses_what_follows_the_length(folder, set_config, tmp_path, kind, verb):
    set_config(folder, **settings(kind))
    values = {"model.backbone": str(folder), "data.synthetic-patients": 60}
    config = from_flat({**values, "privacy.noise-multiplier": 2.0})
    run = tmp_path / "run"
    with pytest.raises(UserError, match=f"rope_type={kind}.*length of the pass") as refused:
        verb(config, command_line=[], run_dir=run)
    assert refused.value.exit_status == 2
    assert not run.exists()
