"""What one process keeps: one open session, the tokens of its hospitals, and a count."""

import gc
import json
import weakref
from dataclasses import replace

import torch

from common.configio import from_flat
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples
from common.training.worker import Worker

KEYS = {
    "data.path": "synthetic",
    "data.synthetic-patients": 20,
    "model.backbone": "tiny",
    "train.device": "cpu",
    "train.dtype": "fp32",
    "train.threads": 1,
}


def test_a_session_is_opened_once_and_let_go_before_the_next(tmp_path, monkeypatch):
    config = from_flat(KEYS | {"run.directory": str(tmp_path)})
    worker, other = Worker(), Worker()
    session = worker.session(config)
    elsewhere = replace(config, federation=replace(config.federation, rounds=7))
    assert worker.session(elsewhere) is session
    assert other.session(config) is not session
    wider = replace(config, adapter=replace(config.adapter, rank=3))
    alive, opened = weakref.ref(session.adapter), []

    def opens(*args, **kwargs):
        gc.collect()
        opened.append(alive() is None)
        return honest(*args, **kwargs)

    honest = worker.session.__func__.__globals__["open_session"]
    monkeypatch.setattr("common.training.worker.open_session", opens)
    del session
    assert worker.session(wider).adapter.spec.rank == 3
    assert opened == [True]
    assert (worker.loads_of(config), other.loads_of(config)) == (2, 1)
    worker.count(config, 300, 2.0)
    worker.count(
        config, 0, 5.0
    )  # a private round tells no tokens, and then its seconds tell nothing
    worker.count(config, 100, 0.5)
    elsewhere = replace(config, run=replace(config.run, directory="another"))
    worker.count(elsewhere, 1000, 1.0)
    worker.session(elsewhere)
    worker.session(replace(elsewhere, adapter=wider.adapter))
    third = replace(wider, run=replace(wider.run, directory="third"))
    worker.session(third)  # which is open
    assert [worker.loads_of(one) for one in (config, elsewhere, third)] == [2, 2, 1]
    worker.report(config)
    (file,) = (tmp_path / "workers").iterdir()
    threads = torch.get_num_threads()
    assert json.loads(file.read_text()) == {
        "backbone_loads": 2,
        "threads": threads,
        "tokens": 400,
        "training_seconds": 2.5,
        "peak_device_bytes": None,
    }


def test_tokens_are_encoded_once_for_each_hospital_and_configuration():
    config = from_flat(KEYS)
    samples = load_samples(config.data).admissions
    hospitals = assign_hospitals(samples, config.partition, hospitals=2, data=config.data)
    worker = Worker()
    first, second = (worker.tokens(config, one) for one in hospitals)
    assert worker.tokens(config, hospitals[0]) is first
    assert (first.name, second.name) == tuple(one.name for one in hospitals)
    shorter = replace(config, train=replace(config.train, max_length=128))
    longest = max(len(one.input_ids) for one in worker.tokens(shorter, hospitals[0]).train)
    assert longest <= 128
    assert worker.loads.total() == 2
    # Of runs one after the other in one process, the last one's tokens are kept.
    held = weakref.ref(worker.tokens(shorter, hospitals[0]))
    worker.tokens(replace(shorter, run=replace(shorter.run, directory="next")), hospitals[0])
    gc.collect()
    assert held() is None
