"""The rule of the marks: what starts a process says so, and what is fast covers every package."""

import ast
import multiprocessing
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from common.provenance import PACKAGES, source_root

COMMAND = [sys.executable, "-c", ""]


INDIRECTLY = {
    "sim/start/fedrx": "the console script, which is tried in processes of its own",
}
"""Folders that no fast test imports by name, and why."""


def fork():
    if os.fork() == 0:
        os._exit(0)


def by_multiprocessing(method):
    process = multiprocessing.get_context(method).Process(target=print)
    return process.start


STARTS = {
    "a command": lambda: subprocess.run(COMMAND),
    "a shell": lambda: os.system("true"),
    "a fork": fork,
    "posix_spawn": lambda: os.posix_spawn(sys.executable, COMMAND, os.environ),
    "spawn": by_multiprocessing("spawn"),
    "fork": by_multiprocessing("fork"),
}


@pytest.mark.xfail(raises=pytest.fail.Exception, strict=True)
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_unmarked_test_that_starts_a_process_fails(start):
    start()


def in_a_thread():
    """As a server under test might."""
    thread = threading.Thread(target=swallowed)
    thread.start()
    thread.join()


def swallowed():
    with suppress(BaseException):
        subprocess.run(COMMAND)


@pytest.mark.parametrize("start", [swallowed, in_a_thread])
def test_swallowed_failure_fails_the_test_at_its_end(start, request):
    passed = pytest.CallInfo.from_call(lambda: None, "call")
    make = request.node.ihook.pytest_runtest_makereport
    assert make(item=request.node, call=passed).passed
    start()
    report = make(item=request.node, call=passed)
    assert report.failed
    assert "starts a process" in report.longrepr


@pytest.mark.process
def test_marked_test_may_start_one():
    assert subprocess.run(COMMAND).returncode == 0


def test_a_question_is_no_process():
    """A run asks git for its commit."""
    subprocess.run(["git", "--version"], check=True, capture_output=True)


def folders_imported_by(module):
    """Return the folders, and those around them, of the modules that a test file imports."""
    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in names]
    return {folder for file in files if file for folder in Path(file).parents}


def test_fast_tests_cover_every_package(request):
    """Each folder of code has a fast test that is no doctest and imports something of it."""
    config = request.config
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.keyword:
        pytest.skip("not all tests were collected")
    modules = {
        item.module
        for item in request.session.items
        if item.get_closest_marker("fast") and not isinstance(item, pytest.DoctestItem)
    }
    root = source_root()
    folders = {
        file.parent for package in PACKAGES for file in (root / package).rglob("__init__.py")
    }
    missing = folders - set().union(*map(folders_imported_by, modules))
    assert {folder.relative_to(root).as_posix() for folder in missing} == set(INDIRECTLY)
