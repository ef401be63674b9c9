"""Run the Flower app in a simulation that shares nothing with any other.

The launcher starts its own SuperLink: in an empty directory, so that Ray cannot import another
``client/`` from the working directory; with its own FLWR_HOME and a free loopback port, so that
two runs never meet; with telemetry, update checks and dependency reinstalls off. It stops
everything it started, also after Ctrl-C and after a failure. It believes our server, which sums a
run up at its end, and where that has not come to it Flower's run state, not its exit status.
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from common.config import Config
from common.configio import flatten, toml_scalar
from common.errors import DiskFull, RunFailed, UserError
from common.files import write_text
from common.rundir import TRAINED, RunDirectory
from sim.flower import orphans
from sim.flower.bundle import stage_app
from sim.flower.child_environment import (
    RUN_VARIABLE,
    child_environment,
    joins_cluster,
    working_folder,
    write_scripts,
)
from sim.flower.flower_log import true_cause
from sim.flower.start_phases import FLOWER, SUPERLINK, phases_of

START_SECONDS = 120.0
STOP_SECONDS = 15.0
CHECK_SECONDS = 10.0
SIMULATION = "flwr-simulation"
"""The command of Flower's that runs the server app and Ray."""
CONNECTION, COMPLETED = "fedrx", "finished:completed"
FLOWER_LOG = "flower.log"
"""What Flower and Ray wrote, kept in the run directory where they failed."""


@dataclass(frozen=True, kw_only=True)
class SuperLink:
    """A SuperLink of our own, ready to take a run."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one ``flwr`` command against this SuperLink."""
        return subprocess.run(
            [script("flwr"), *arguments],
            env=self.environment,
            cwd=self.folder / "empty",
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )

    def log(self) -> str:
        """Return what the SuperLink has written."""
        return (self.folder / "superlink.log").read_text(encoding="utf-8", errors="replace")

    def state(self) -> tuple[str, str]:
        """Return the state and its details of the only run, such as ``finished:failed``."""
        answer = self.flwr("ls", CONNECTION, "--format", "json")
        with contextlib.suppress(json.JSONDecodeError, KeyError, IndexError):
            run = json.loads(answer.stdout)["runs"][0]
            return str(run["status"]), str(run["status-details"])
        return "unknown", answer.stderr.strip()[-500:]


def script(name: str) -> str:
    """Return the path of a console script of this environment."""
    beside = Path(sysconfig.get_path("scripts")) / name
    return str(beside) if beside.exists() else name


def free_port(wanted: int = 0) -> int:
    """Return a free loopback port; one that was not named stays free for who binds it by number.

    The system gives a port with a connection that has just ended (TIME_WAIT, a minute) to nobody
    who asks for any, and servers take it by SO_REUSEADDR.

    Raises:
        UserError: if ``wanted`` is not 0 and is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise UserError(
                f"run.port={wanted}: {error.strerror}",
                allowed="a free port, or 0",
                fix="stop what listens there, or leave run.port at 0",
            ) from None
        address = probe.getsockname()
        if not wanted:
            probe.listen()
            with socket.create_connection(address) as caller:
                probe.accept()[0].close()  # who closes first keeps the port
                caller.recv(1)
        return int(address[1])


@contextlib.contextmanager
def superlink(run: Path, port: int = 0) -> Iterator[SuperLink]:
    """Start a private SuperLink in simulation mode; stop it and all it started at the end.

    Args:
        run: The run directory; marks the processes.
        port: Loopback port; 0: a free one.

    Raises:
        UserError: if the wanted port is in use.
        RunFailed: if it does not come up.
    """
    port = free_port(port)
    with working_folder() as folder, _orphans_ended(folder):
        for sub in ("empty", "home"):
            (folder / sub).mkdir()
        write_text(
            folder / "home" / "config.toml",
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        )
        write_scripts(folder)
        environment = child_environment(folder, run=run)
        command = [
            *(script("flower-superlink"), "--insecure", "--simulation"),
            *("--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)),
        ]
        with (folder / "superlink.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder / "empty",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=ending_with_parent(),
            )
        link = SuperLink(port=port, folder=folder, process=process, environment=environment)
        try:
            with _terminated_like_interrupted():
                _wait_until_up(link, run)
                yield link
        finally:
            stop(process, run)


def run_flower(
    config: Config,
    run: RunDirectory,
    *,
    workers: int,
    gpus_per_worker: float,
    on_tick: Callable[[], None],
    on_phase: Callable[[str], None] = lambda phase: None,
) -> None:
    """Run the federation of ``config`` to its end.

    Args:
        config: Complete, with ``run.directory`` absolute.
        run: The run directory that the apps write to.
        workers: Ray actors.
        gpus_per_worker: Share of a GPU that each actor holds.
        on_tick: Called a few times a second, to show progress.
        on_phase: Called with the phase that the start has come to; empty once hospitals train.

    Raises:
        RunFailed: if Flower does not end the run as completed, with the reason.
    """
    on_phase(SUPERLINK)
    with superlink(run.path, config.run.port) as link:
        on_phase(FLOWER)
        phase = phases_of(link.folder, run)
        app = stage_app(link.folder, version=importlib.metadata.version("fedrx"))
        overrides = link.folder / "run-config.toml"
        write_text(
            overrides,
            "".join(f"{key} = {toml_scalar(value)}\n" for key, value in flatten(config).items()),
        )
        federation = (
            f"num-supernodes={config.federation.hospitals} client-resources-num-cpus=1 "
            f"client-resources-num-gpus={gpus_per_worker}"
        )
        if not joins_cluster():
            federation += f" init-args-num-cpus={workers}"
        started = link.flwr(
            *("run", str(app), CONNECTION, "--format", "json"),
            *("--run-config", str(overrides), "--federation-config", federation),
        )
        if started.returncode or '"success": true' not in started.stdout:
            raise _failed(run.path, "Flower did not take the run", started.stdout + started.stderr)

        def look() -> None:
            on_phase(phase())
            on_tick()

        state, details = _watch(link, run, look)
        if state != COMPLETED:
            log = link.flwr("log", json.loads(started.stdout)["run-id"], CONNECTION, "--show")
            failure = _failed(
                *(run.path, f"Flower ended the run {state}", log.stdout, link.log()),
                otherwise=details,
            )
            reason = run.status().error
            raise RunFailed(reason) if reason else failure


def stop(process: subprocess.Popen[bytes], run: Path) -> None:
    """End a SuperLink and every process of its run, at once.

    All that a run writes is complete or absent, so nothing is lost, and their own farewells would
    take seconds.
    """
    process.kill()
    end_leftovers(run)
    process.wait()


def processes_of(run: Path) -> list[psutil.Process]:
    """Return the Flower and Ray processes that were started for a run directory."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(RUN_VARIABLE) == str(run):
                # Ray's agents write their title over their environment: found as children.
                found |= {process, *process.children(recursive=True)}
    return sorted(found, key=lambda one: one.pid)


def end_leftovers(run: Path) -> None:
    """Kill what a killed launcher left behind, so that nobody else writes to the run.

    Who has ended and waits for its parent to ask how writes no more: it is not waited for.
    """
    deadline = time.monotonic() + STOP_SECONDS
    while (leftovers := processes_of(run)) and time.monotonic() < deadline:
        for process in leftovers:
            # All stand before one is killed: a child without our environment that is born
            # meanwhile would be nobody's, and stay.
            for one in orphans.stopped_family(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        time.sleep(0.02)


def _watch(link: SuperLink, run: RunDirectory, on_tick: Callable[[], None]) -> tuple[str, str]:
    """Wait until our server has summed up, or Flower says that the run has finished."""
    last_check = time.monotonic()
    while True:
        on_tick()
        status = run.status()
        if status.stage == TRAINED:
            return COMPLETED, ""
        if link.process.poll() is not None:
            return "stopped", "the SuperLink ended"
        failed = status.state == "failed"
        if failed or time.monotonic() - last_check > CHECK_SECONDS:
            last_check = time.monotonic()
            # To ask Flower costs a second of a core, which hospitals are training on.
            state, details = link.state() if failed or not _is_simulating() else ("running", "")
            if state.startswith("finished"):
                return state, details
        time.sleep(1.0 if failed else 0.25)


def _is_simulating() -> bool:
    """Tell whether Flower's simulation, which this process has started, is alive."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(Path(part).name == SIMULATION for part in child.cmdline()):
                return True
    return False


def _wait_until_up(link: SuperLink, run: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if link.process.poll() is not None:
            break
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            direct.open(f"http://127.0.0.1:{link.port}/health", timeout=1) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise _failed(run, "the SuperLink did not start", link.log())


def _failed(run: Path, what: str, *logs: str, otherwise: str = "") -> RunFailed:
    """Keep the logs in the run directory, and name the cause that stands in the first that has one.

    Args:
        run: The run directory; the logs go to its flower.log.
        what: What failed.
        logs: What Flower and Ray wrote.
        otherwise: The reason where no log tells one; default the last line.
    """
    text = "\n".join(logs)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = next(filter(None, map(true_cause, logs)), otherwise or "".join(lines[-1:]))
    try:
        write_text(run / FLOWER_LOG, text)
    except (OSError, DiskFull) as error:
        return RunFailed(f"{what}: {cause} ({getattr(error, 'strerror', None) or error})")
    return RunFailed(f"{what}: {cause}; see {run / FLOWER_LOG}")


@contextlib.contextmanager
def _orphans_ended(folder: Path) -> Iterator[None]:
    """Keep a process that ends a launch's processes should this one be killed with -9."""
    watching = subprocess.Popen(
        [sys.executable, "-I", orphans.__file__, str(folder), str(folder / "home")],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watching.communicate(b"ended")


def ending_with_parent() -> Callable[[], None] | None:
    """Return what a child calls between fork and exec, to end with its parent (Linux).

    What it needs is looked up here: another thread may be loading a library while we fork, and
    the child would wait for it for ever.
    """
    if sys.platform != "linux":
        return None
    return partial(end_with_parent, ctypes.CDLL(None).prctl, os.getpid())


def end_with_parent(prctl: Callable[[int, int], int] | None = None, parent: int = 0) -> None:
    """Ask Linux to end this process when its parent dies (PR_SET_PDEATHSIG).

    Args:
        prctl: The C library's.
        parent: Its process id, if it may have died before Linux is asked; then this one ends too.
    """
    (prctl or ctypes.CDLL(None).prctl)(1, signal.SIGTERM)
    if parent and os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Treat SIGTERM (a batch system's end) like Ctrl-C while Flower runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
