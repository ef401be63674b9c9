"""What cannot work is refused before data is read, weights are hashed or anything is written."""

import pytest

import sim.runs.federate
import sim.runs.paper
import sim.runs.preparation
import sim.runs.single
from common.configio import from_flat
from common.errors import UserError
from common.training.worker import Worker
from sim.process.progress import SILENT

TINY = {"data.synthetic-patients": 40, "model.backbone": "tiny", "adapter.rank": 2}


def test_scored_lists_without_validation_patients_are_refused_before_training():
    config = from_flat({**TINY, "evaluation.method": "score", "data.validation-fraction": 0.0})
    with pytest.raises(UserError, match=r"raise data\.validation-fraction"):
        sim.runs.preparation.prepare(config, SILENT, Worker())


class Touched(Exception):
    """Data or weights were read although the answer was known."""


@pytest.mark.parametrize(
    ("verb", "values", "said"),
    [
        ("single", {}, "is not empty"),
        ("federate", {}, "is not empty"),
        ("paper", {}, "is not empty"),
        ("single", {"train.device": "cuda:99"}, "train.device=cuda:99"),
        ("federate", {"train.device": "cuda:99"}, "train.device=cuda:99"),
        ("paper", {"train.device": "cuda:99"}, "train.device=cuda:99"),
        ("single", {"adapter.targets": "q_porj"}, "q_porj"),
        ("federate", {"adapter.targets": "q_porj"}, "q_porj"),
        ("federate", {"model.attention": "flash-attn"}, "model.attention"),
        ("single", {"data.normalisation": "map", "data.drug-map": "absent.csv"}, "absent.csv"),
        ("single", {"data.normalisation": "atc-3", "data.drug-map": "absent.csv"}, "absent.csv"),
        ("federate", {"evaluation.formulary": "absent.txt"}, "absent.txt"),
        ("federate", {"evaluation.interactions": "absent.csv"}, "absent.csv"),
    ],
)
def test_what_cannot_work_is_refused_before_data_and_weights(
    tmp_path, monkeypatch, verb, values, said
):
    def touched(*args, **keys):
        raise Touched

    monkeypatch.setattr("common.training.worker.open_hospitals", touched)
    monkeypatch.setattr(sim.runs.preparation, "resolve_backbone", touched)
    folder = tmp_path / "run"
    if said == "is not empty":
        folder.mkdir()
        (folder / "precious").write_text("")
    config = from_flat({**TINY, **values})
    common = {"command_line": (), "run_dir": folder}
    with pytest.raises(UserError, match=said):
        if verb == "paper":
            sim.runs.paper.paper(config, scale="small", ranks=(2,), **common)
        else:
            {"single": sim.runs.single.single, "federate": sim.runs.federate.federate}[verb](
                config, **common
            )
    assert not folder.exists() or [file.name for file in folder.iterdir()] == ["precious"]


def test_a_folder_is_checked_by_its_configuration_alone(tmp_path, monkeypatch):
    """A backbone's folder that is no Llama, or a rank beyond its width, needs no hashing."""
    monkeypatch.setattr(
        "common.training.worker.open_hospitals", lambda *a, **k: pytest.fail("data was read")
    )
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    config = from_flat({**TINY, "model.backbone": str(tmp_path)})
    with pytest.raises(UserError, match="not a Llama"):
        sim.runs.preparation.prepare(config, SILENT, Worker())
