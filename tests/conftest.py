"""What all tests share: the MIMIC-IV demo's folder, quiet processes, and the rule of the marks.

What is not fast is marked by what it starts, or ``slow`` by its time (``pyproject.toml`` lists the
marks); everything without a mark is marked ``fast`` here. Fast and slow ones fail if they start a
process all the same, but for ``QUESTIONS``.
"""

import _posixsubprocess
import gc
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["federation_fixtures", "privacy_fixtures", "two_processes"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads this when it is imported: its interpreter runs GPU kernels where there is no GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

STARTING = {"process", "ray", "browser", "embedded"}
"""Marks of tests that may start processes."""
NOT_FAST = {*STARTING, "slow"}
QUESTIONS = {"git", "lscpu", "uname"}
"""Commands that answer at once, asked in passing: by a run, openai, joblib."""
EVENTS = {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}


class ProcessGuard:
    """Fails a test that starts a process without a mark that says so."""

    def __init__(self) -> None:
        self.watching = False
        self.started: list[str] = []
        sys.addaudithook(self.hear)
        # multiprocessing's spawn raises no audit event.
        self._fork_exec = _posixsubprocess.fork_exec
        _posixsubprocess.fork_exec = self._watched_fork_exec

    def watch(self, item: pytest.Item | None) -> None:
        """Watch a test, unless it is marked; with None watch nothing."""
        self.started = []
        self.watching = item is not None and not STARTING & marks_of(item)

    def hear(self, event: str, arguments: Sequence[Any]) -> None:
        """Take what Python tells of everything that it does (an audit hook)."""
        if self.watching and event == "subprocess.Popen":
            command = arguments[1]
            first = command if isinstance(command, (str, bytes, os.PathLike)) else command[0]
            if Path(os.fsdecode(first)).name not in QUESTIONS:
                self._refuse(os.fsdecode(first))
        elif self.watching and event in EVENTS:
            self._refuse(event)

    def _watched_fork_exec(self, *arguments: Any) -> int:
        if self.watching:
            self._refuse("multiprocessing")
        return self._fork_exec(*arguments)

    def _refuse(self, what: str) -> None:
        self.started.append(what)
        pytest.fail(self.reason, pytrace=True)

    @property
    def reason(self) -> str:
        """Return what is wrong with the test."""
        marks = ", ".join(sorted(STARTING))
        return f"starts a process ({self.started[0]}) without one of the marks {marks}"


GUARD = ProcessGuard()


def marks_of(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if not NOT_FAST & marks_of(item):
            item.add_marker("fast")


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all modules again and again."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    GUARD.watch(item)
    try:
        return (yield)
    finally:
        GUARD.watch(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test whose code has swallowed the guard's failure, or met it in another thread."""
    report = yield
    if report.passed and GUARD.started:
        report.outcome, report.longrepr = "failed", GUARD.reason
    GUARD.started.clear()
    return report


@pytest.fixture(autouse=True, scope="session")
def unsynced() -> Generator[None]:
    """Do not wait for the disk, 3 ms a file: no test of this process pulls the plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which still refuses a file that is closed
        yield


LOOK_AT_PICTURES = ("tests/sim/report/", "tests/sim/cli/", "tests/benchmarks/")


@pytest.fixture(autouse=True, scope="module")
def pictures(request: pytest.FixtureRequest) -> Generator[None]:
    """Draw the pictures of a run's report where tests look at them: they take a second a run."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.nodeid.startswith(LOOK_AT_PICTURES):
            patch.setattr("sim.report.plots.rendered", lambda *_: b"<svg></svg>")
        yield


@pytest.fixture(scope="session")
def mimic_demo() -> Path:
    """Folder of the MIMIC-IV Clinical Database Demo 2.2, or skip with the reason."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "mimic-iv-demo"
    folder = Path(os.environ.get("FEDRX_MIMIC_DEMO", beside))
    if not (folder / "hosp").is_dir():
        pytest.skip("no MIMIC-IV demo: set FEDRX_MIMIC_DEMO to its folder")
    return folder
