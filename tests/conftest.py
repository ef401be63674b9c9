"""Fixtures shared by all tests: the MIMIC-IV demo's folder and quiet processes."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["federation_fixtures", "privacy_fixtures"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is imported: its interpreter runs GPU kernels where there is no GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def mimic_demo() -> Path:
    """Folder of the MIMIC-IV Clinical Database Demo 2.2, or skip with the reason."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "mimic-iv-demo"
    folder = Path(os.environ.get("FEDRX_MIMIC_DEMO", beside))
    if not (folder / "hosp").is_dir():
        pytest.skip("no MIMIC-IV demo: set FEDRX_MIMIC_DEMO to its folder")
    return folder
