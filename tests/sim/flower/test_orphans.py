"""kill -9 of the launcher takes along what it has started, and nothing else."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import until

import sim.flower.orphans
import sim.flower.superlink

# A launcher whose SuperLink has a child in a session of its own, as Ray's actors are, and that one
# a child that shows no environment, as Ray's agents do.
LAUNCHER = """
import subprocess, sys, time
from pathlib import Path
from sim.flower.superlink import superlink
with superlink(Path(sys.argv[1])) as link:
    sleep = "import time; time.sleep(600)"
    bare = f"Popen([sys.executable, '-c', {sleep!r}, {str(link.folder)!r}], env={{}})"
    both = f"import sys; from subprocess import Popen; {bare}; {sleep}"
    child = [sys.executable, "-c", both]
    subprocess.Popen(child, env=link.environment, start_new_session=True)
    print(link.folder, flush=True)
    if sys.argv[2] == "stay":
        time.sleep(600)
"""


def of_launch(folder: str) -> list[psutil.Process]:
    """Return the processes that work in a launcher's folder, or watch over it."""
    found = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("FLWR_HOME", "")
            if home.startswith(folder) or folder in process.cmdline():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def of_bare_child(folder: str) -> list[psutil.Process]:
    """Return the child's child, which shows no environment."""
    return [one for one in of_launch(folder) if "import time; time.sleep(600)" in one.cmdline()]


def launched(run, mode: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run), mode], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


@pytest.mark.process
def test_a_killed_launcher_takes_its_processes_and_its_folder_along(tmp_path):
    other, untouched = launched(tmp_path / "other", "stay")
    killed, folder = launched(tmp_path / "killed", "stay")
    # The SuperLink, the child, its child (the last to be there), the watch.
    until(lambda: of_bare_child(folder), "the child's child")
    assert len(of_launch(folder)) >= 4
    assert Path(folder).is_dir()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    until(lambda: not of_launch(folder), "its processes end")
    assert not Path(folder).exists()
    assert len(of_launch(untouched)) >= 3
    other.send_signal(signal.SIGTERM)
    other.wait()
    assert of_launch(untouched) == []
    assert not Path(untouched).exists()


@pytest.mark.process
def test_a_launcher_that_ends_by_itself_leaves_nothing(tmp_path):
    process, folder = launched(tmp_path / "run", "go")
    assert process.wait() == 0
    assert of_launch(folder) == []


# A process of the launch, whose child shows no environment and always has just had a child.
RESTLESS = """
import os, signal, subprocess, sys, time
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, "-c", os.environ["RESTLESS"], sys.argv[1], "bare"], env={})
    time.sleep(600)
before, end = 0, time.monotonic() + 120  # by itself too, should the test fail before the watch runs
while time.monotonic() < end:
    child = os.fork()
    if child == 0:
        time.sleep(600)
    if before:
        os.kill(before, signal.SIGKILL)
        os.waitpid(before, 0)
    before = child
"""


def of_bare(folder: Path) -> list[psutil.Process]:
    found = []
    for one in of_launch(str(folder)):
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.cmdline()[-1:] == ["bare"]:
                found.append(one)
    return found


@pytest.mark.process
@pytest.mark.parametrize("ended_by", ["the watch", "the launcher"])
def test_a_child_that_is_born_while_its_parent_is_killed_does_not_stay(ended_by, tmp_path):
    folder = tmp_path / "launch"
    folder.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", RESTLESS, str(folder)],
        env={
            "FLWR_HOME": str(folder),
            sim.flower.superlink.RUN_VARIABLE: str(folder),
            "RESTLESS": RESTLESS,
        },
    )
    until(lambda: of_bare(folder), "the child")
    if ended_by == "the watch":
        watch = [sys.executable, sim.flower.orphans.__file__, str(folder), str(folder)]
        subprocess.run(watch, stdin=subprocess.DEVNULL, check=True)
    else:
        sim.flower.superlink.end_leftovers(folder)
    parent.wait()
    left = of_bare(folder)
    for one in left:
        one.kill()
    assert left == []


def test_a_launcher_ends_whole_families_that_stand(monkeypatch, tmp_path):
    ended, looks = [], iter([["parent"], []])

    class Process:
        def __init__(self, name: str) -> None:
            self.name = name

        def kill(self) -> None:
            ended.append(self.name)

    monkeypatch.setattr(
        sim.flower.superlink, "processes_of", lambda run: list(map(Process, next(looks)))
    )
    monkeypatch.setattr(
        sim.flower.orphans, "stopped_family", lambda one: {one, Process("born meanwhile")}
    )
    sim.flower.superlink.end_leftovers(tmp_path)
    assert sorted(ended) == ["born meanwhile", "parent"]


@pytest.mark.process
def test_who_has_ended_is_not_waited_for(tmp_path, monkeypatch):
    """Its parent may ask how it ended a second later, or never: it writes no more."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env={**os.environ, sim.flower.superlink.RUN_VARIABLE: str(tmp_path)},
    )
    looks = []
    find = sim.flower.superlink.processes_of
    until(lambda: find(tmp_path), "the child")
    monkeypatch.setattr(
        sim.flower.superlink, "processes_of", lambda run: looks.append(run) or find(run)
    )
    sim.flower.superlink.end_leftovers(tmp_path)  # this process has not asked
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    assert len(looks) < 50  # of some 400 until it gives up
    assert child.wait() == -signal.SIGKILL


# It asks to end with its parent only when that has died, and says so if it lives on.
LATE = """
import os, time
from sim.flower.superlink import ending_with_parent
parent, end = os.getpid(), ending_with_parent()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    end()
    print("alive", flush=True)
os._exit(0)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_child_whose_parent_is_killed_before_it_asks_ends_too():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
