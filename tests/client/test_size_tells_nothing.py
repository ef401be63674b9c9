"""A private run tells by no failure how many patients a deployed hospital has, who, or with what.

The server chooses the split, the smallest size, the prompt's frame and its length: an answer that
one patient turns into a refusal has no noise.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.handlers
from client.kept_state import own_folder
from client.policy import POLICY
from common.config import Config
from common.configio import flatten
from common.data import partition
from common.data.prepare import load_samples
from common.errors import RunFailed, SettingError
from common.training import hospital_data
from common.training.hospital_data import encode_hospital
from common.training.worker import Worker
from common.wire.contract import train_message

PRIVATE: dict[str, Any] = {"privacy__noise_multiplier": 2.0, "privacy__sampling_rate": 0.5}
NOBODY_TRAINS: dict[str, Any] = {"data__validation_fraction": 0.5, "data__test_fraction": 0.5}
TOO_FEW = {"partition__min_patients": 1000}

pytestmark = pytest.mark.usefixtures("quick_accounting")


def asked(kind: str, config: Config, folder: Path, worker: Worker) -> RecordDict:
    """Ask a deployed hospital that lets the server decide."""
    (own_folder(folder) / POLICY).touch()
    node = {"hospital": "north", "data": "synthetic", "folder": str(folder)}
    content = RecordDict({"config": ConfigRecord({"round": 0})})
    if kind == "train":
        b = {key: np.zeros_like(v) for key, v in worker.session(config).adapter.state().items()}
        content = train_message(b, server_round=1)
    message = Message(content, 1, kind)
    context = Context(1, 1, node, RecordDict(), flatten(config))
    return client.handlers.answer(kind, message, context, worker).content


@pytest.mark.parametrize("kind", ["query", "train"])
@pytest.mark.parametrize("keys", [NOBODY_TRAINS, TOO_FEW], ids=str)
def test_who_is_there_decides_nothing(tiny_config, tmp_path, monkeypatch, kind, keys) -> None:
    worker = Worker()
    usual = asked(kind, tiny_config(**PRIVATE), tmp_path, worker)
    few = asked(kind, tiny_config(**PRIVATE, **keys), tmp_path, worker)
    assert names(few) == names(usual)
    if kind == "query":  # without privacy sizes are told, and a small hospital says so
        with pytest.raises(SettingError, match="leaves hospital-1 with"):
            asked(kind, tiny_config(**keys), tmp_path, worker)
    monkeypatch.setattr("client.node.protects", lambda config: False)  # the mutant
    with pytest.raises(RunFailed, match="the reason stays in the hospital"):
        asked(kind, tiny_config(**PRIVATE, **keys), tmp_path, Worker())


def names(content: RecordDict) -> list[tuple[str, tuple[str, ...]]]:
    return sorted((name, tuple(record)) for name, record in content.items())


def test_no_patient_s_frame_stops_a_private_round(tiny_config, open_tiny) -> None:
    """One of the patients has the longest frame; the length holds all the others'."""
    session = open_tiny()
    usual = tiny_config(**PRIVATE)
    text = replace(usual.text, template="Ill with\n{diagnoses}\n" + "{sex} " * 8)
    (hospital,) = partition.assign_hospitals(
        load_samples(usual.data).admissions, usual.partition, hospitals=1, data=usual.data
    )
    first, *others = hospital.train
    odd = replace(first, patient=10**6, sex="F, as the passport says", diagnoses=())
    places = {"with": (odd, *others), "without": tuple(others)}

    def encoded(who: str, length: int, config: Config = usual) -> hospital_data.HospitalData:
        train = replace(config.train, max_length=length)
        there = replace(hospital, train=places[who])
        return encode_hospital(there, session, replace(config, text=text, train=train))

    length = next(n for n in range(64, 999, 2) if fits(encoded, "without", n, tiny_config()))
    assert not fits(encoded, "with", length, tiny_config())
    assert encoded("with", length) == encoded("without", length)
    assert len(encoded("with", 999).train) == len(encoded("without", 999).train) + 1
    with pytest.raises(SettingError, match="do not hold a prompt"):  # whoever is there
        encoded("without", 64)


def fits(encoded: Any, *asked: Any) -> bool:
    try:
        encoded(*asked)
    except SettingError:
        return False
    return True
