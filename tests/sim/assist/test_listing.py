"""One patient's list with confidences: against the ranking, and what is missing without data."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config import OWN_TEXT, Config, EvaluationConfig, ModelConfig, TrainConfig
from common.data.dataset import Dataset
from common.data.partition import Hospital
from common.data.samples import Admission, SampleTable
from common.errors import UserError
from common.evaluation.formulary import formulary_of
from common.evaluation.ranking import Ranker
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import open_session
from common.text.batches import encode_prompt
from sim.assist.listing import Lister

CONFIG = Config(
    model=ModelConfig(backbone="tiny"),
    train=TrainConfig(max_length=512),
    evaluation=EvaluationConfig(max_new_tokens=60),
)
DRUGS = ("Aspirin", "Heparin", "Insulin", "Senna")


def admissions(start, count):
    return tuple(
        Admission(
            patient=start + n,
            admission=start + n,
            sex="F",
            age=50 + n,
            diagnoses=("Sepsis",),
            drugs=DRUGS[: 1 + n % 4],
        )
        for n in range(count)
    )


PATIENT = admissions(90, 1)[0]
DATA = Dataset(
    samples=SampleTable(admissions=(), counts={}, source="synthetic"),
    hospitals=tuple(
        Hospital(
            name=name, train=admissions(n, 8), validation=admissions(n + 20, 4), test=(PATIENT,)
        )
        for name, n in (("north", 0), ("south", 50))
    ),
)


@pytest.fixture(scope="module")
def session():
    opened = open_session(resolve_backbone("tiny"), AdapterSpec(rank=4), device="cpu", dtype="fp32")
    noise = torch.randn(opened.adapter.flat.shape, generator=torch.Generator().manual_seed(0))
    opened.adapter.flat.copy_(0.3 * noise)
    return opened


def lister(session, data=DATA, **settings):
    evaluation = replace(CONFIG.evaluation, **settings)
    return Lister(session, replace(CONFIG, evaluation=evaluation), data)


@pytest.fixture(scope="module")
def ranking(session):
    ranker = Ranker(session, formulary_of(DATA.train), text=OWN_TEXT, max_length_tokens=512)
    validation = [one for hospital in DATA.hospitals for one in hospital.validation]
    ids, _ = encode_prompt(PATIENT, session.tokenizer, text=OWN_TEXT, max_length_tokens=512)
    (found,) = ranker.rank([ids], ranker.fit(validation, samples=64, seed=0))
    return found


def test_a_scored_list_is_the_ranking_of_all_hospitals_names(session, ranking):
    found = lister(session, method="score").list_drugs(PATIENT)
    assert found.names == tuple(drug.name for drug in ranking.listed)
    assert found.confidences == pytest.approx([drug.confidence for drug in ranking.listed])
    assert found.ends == ranking.ends


def test_a_written_list_has_the_rankings_confidences(session, ranking):
    found = lister(session, decoding="formulary").list_drugs(PATIENT)
    told = {drug.name: drug.confidence for drug in ranking.drugs}
    assert found.names
    assert found.confidences == pytest.approx([told[name] for name in found.names])
    assert found.ends == "the model ended it"


def test_a_name_outside_the_formulary_has_no_confidence(session, monkeypatch):
    here = lister(session)
    monkeypatch.setattr(
        here, "_written", lambda ids: ("Drugs:\n- Senna\n- Unheard Of\n- cu", False)
    )
    found = here.list_drugs(PATIENT)
    assert found.names == ("Senna", "Unheard Of")
    assert np.isfinite(found.confidences[0])
    assert found.confidences[1] is None
    assert found.ends == "it was cut at 60 tokens (evaluation.max-new-tokens)"


def test_without_the_tables_there_are_no_confidences(session):
    here = lister(session, data=None)
    here._written = lambda ids: ("Drugs:\n- Senna", True)
    assert here.list_drugs(PATIENT).confidences == (None,)


def test_what_needs_the_tables_says_so(session, tmp_path):
    with pytest.raises(UserError, match=r"method=score needs.*--set evaluation\.method=generate"):
        lister(session, data=None, method="score")
    with pytest.raises(UserError, match=r"decoding=formulary needs.*evaluation\.formulary=FILE"):
        lister(session, data=None, decoding="formulary")
    file = tmp_path / "names.txt"
    file.write_text("Warfarin\n")
    found = lister(session, data=None, decoding="formulary", formulary=str(file))
    assert found.list_drugs(PATIENT).names == ("Warfarin",)
