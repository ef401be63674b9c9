"""What the privacy tests share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from common.model.backbone import resolve_backbone
from common.model.falora import AdapterSpec
from common.model.session import Session, open_session
from common.privacy.plan import PrivacyPlan
from common.text.batches import Encoded

DEFAULTS: dict[str, Any] = {
    "clip_norm": 1.0,
    "noise_multiplier": 1.5,
    "sampling_rate": 0.1,
    "steps": 40,
    "expected_batch": 8.0,
    "max_admissions_per_patient": 4,
    "delta": 1e-5,
}


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., PrivacyPlan]:
    """Build a plan; keyword arguments replace the defaults."""
    return lambda **changes: PrivacyPlan(**(DEFAULTS | changes))


def random_samples(lengths: Sequence[int], units: Sequence[int], seed: int = 0) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(
            input_ids=tuple(torch.randint(2, 1000, (n,), generator=generator).tolist()),
            answer_start=n // 2,
            unit=unit,
        )
        for n, unit in zip(lengths, units, strict=True)
    ]


@pytest.fixture(scope="session")
def samples_of() -> Callable[..., list[Encoded]]:
    """Build random samples of given lengths and units."""
    return random_samples


@pytest.fixture
def open_tiny() -> Callable[..., Session]:
    """Open the tiny backbone with a random, non-zero B, in fp32 unless asked otherwise."""

    def opened(mode: str = "fa-lora", rank: int = 4, **choices: str) -> Session:
        spec = AdapterSpec(rank=rank, alpha=4.0, mode=mode)
        choices = {"device": "cpu", "dtype": "fp32", **choices}
        session = open_session(resolve_backbone("tiny"), spec, **choices)
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(session.adapter.flat.shape, generator=generator)
        session.adapter.flat.add_(noise.to(session.torch_device), alpha=0.2)
        return session

    return opened


@pytest.fixture(scope="module")
def task_identity() -> Iterator[None]:
    """Set what Flower's processes set before they make messages."""
    names = ("_task_id", "_run_id", "_node_id")
    before = [getattr(TaskIdentity, name) for name in names]
    for name in names:
        setattr(TaskIdentity, name, 1)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(TaskIdentity, name, value)
