"""What the privacy tests share."""

from collections.abc import Callable
from typing import Any

import pytest

from common.privacy.plan import PrivacyPlan

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
