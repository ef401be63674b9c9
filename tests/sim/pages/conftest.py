"""Debian's Chromium, headless and without a network of its own, and a run to show."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from line_fixtures import prediction_line

from common.config import Config
from common.rundir import RunDirectory

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1400,1000",
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A browser that logs its network requests and downloads into ``tmp_path / "downloads"``."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver (Debian: chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    running.set_script_timeout(20)
    try:
        yield running
    finally:
        running.quit()


@pytest.fixture
def requested_urls(browser: Any) -> Any:
    """Return a function that gives every address the page asked for."""

    def urls() -> list[str]:
        events = [
            json.loads(entry["message"])["message"] for entry in browser.get_log("performance")
        ]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in sent]

    return urls


def line(case: str, model: str, answer: list[str] | None, truth: list[str]) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    patient = {"sex": "F", "age": "71", "height_cm": 165.0, "weight_kg": 80.2, "bmi": 29.5}
    return prediction_line(
        case,
        model,
        answer,
        cluster=int(case[-1]),
        patient={**patient, "subject_id": "patient-secret"},
        diagnoses=["Heart failure, unspecified", "<img src=x onerror=alert(1)>"],
        truth=truth,
        text="text-secret",
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Two cases with two lists each, and a third where one model kept to no format."""
    directory = RunDirectory.create(Config(), directory=tmp_path / "run")
    for record in (
        line("case-1", "fedrx", ["Furosemide", "Aspirin"], ["Furosemide", "Lisinopril"]),
        line("case-1", "popularity", ["Docusate"], ["Furosemide", "Lisinopril"]),
        line("case-2", "fedrx", ["</script><script>alert(2)</script>", "Insulin"], ["Insulin"]),
        line("case-2", "popularity", ["Docusate", "Senna"], ["Insulin"]),
        line("case-3", "fedrx", None, ["Warfarin"]),
        line("case-3", "popularity", ["Docusate"], ["Warfarin"]),
    ):
        directory.append("predictions.jsonl", record)
    directory.write_json("summary.json", {"source": "demo"})
    return directory
