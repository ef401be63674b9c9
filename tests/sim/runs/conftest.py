"""A single-node training small enough to be run dozens of times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from privacy_fixtures import random_samples

from common.config import Config
from common.configio import from_flat
from common.rundir import RunDirectory
from common.text.batches import Encoded
from common.training.hospital_data import HospitalData
from common.training.worker import Worker
from sim.process.progress import SILENT, Console
from sim.runs.single_training import SingleTraining

BASE: dict[str, Any] = {
    "model.backbone": "tiny",
    "adapter.rank": 4,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "train.threads": 1,
    "train.batch-size": 2,
    "train.learning-rate": 0.05,
    "train.checkpoint-every": 3,
    "federation.hospitals": 1,
}


def samples_of_any_length(count: int, seed: int) -> tuple[Encoded, ...]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 24, (count,), generator=generator).tolist()
    return tuple(random_samples(lengths, seed=generator))


@pytest.fixture(scope="session")
def hospital() -> HospitalData:
    """Eleven training samples, so that epochs end inside batches."""
    return HospitalData(
        name="hospital-1",
        train=samples_of_any_length(11, 1),
        validation=samples_of_any_length(3, 2),
    )


@pytest.fixture(scope="session")
def configure() -> Callable[..., Config]:
    """Build a configuration of dotted keys over small defaults."""

    def built(keys: dict[str, Any] | None = None) -> Config:
        return from_flat({**BASE, **(keys or {})})

    return built


@pytest.fixture
def begin(hospital: HospitalData, tmp_path: Path) -> Callable[..., SingleTraining]:
    """Begin, or go on with, a training in a run directory."""

    def begun(config: Config, *, name: str = "run", console: Console = SILENT):
        path = tmp_path / name
        run = RunDirectory(path)
        if not path.exists():
            run = RunDirectory.create(config, directory=path)
        training = SingleTraining(
            run=run,
            config=config,
            session=Worker().session(config),
            hospital=hospital,
            console=console,
        )
        training.restore()
        return training

    return begun
