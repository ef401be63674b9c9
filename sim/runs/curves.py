"""A run's curves while it trains: metrics.jsonl, followed by TensorBoard or MLflow.

Trackers are fed from the run directory alone, which is the same for a federation and a single
run, and holds no patient's data. What a resumed run forgets and writes again replaces the file;
then the tracker begins anew too, so it always tells what metrics.jsonl tells.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from common.config import Config, RunConfig
from common.data.handling import SYNTHETIC, handling_of
from common.errors import UserError
from common.evaluation.judge.gate import (
    SHORTEST_AGREEMENT,
    Endpoint,
    check_endpoint,
)
from common.privacy.settings import protects
from common.records.run import Metric
from common.rundir import METRICS, RunDirectory
from sim.process.extras import require_extra
from sim.process.failures import LONGEST_TEXT
from sim.process.progress import SILENT, Console
from sim.runs.trackers import MLflow, Point, TensorBoard, Tracker, public_configuration

NONE, TENSORBOARD, MLFLOW = "none", "tensorboard", "mlflow"
MLFLOW_NOTE = "mlflow.json"
SECONDS = 1.0
"""Between two looks at metrics.jsonl."""
_NO_CURVES = {"name", "value", "round", "step", "hospital", "time"}


def points(event: Metric) -> list[Point]:
    """Return the numbers of one event of metrics.jsonl as points of curves.

    A label that is a number, such as a step's learning rate, is a curve of its own. Texts are none:
    a reason may hold a hospital's words.

    >>> points(Metric(name="train-loss", value=2.5, round=3, hospital="north", time=9.0))
    [Point(tag='train-loss-by-hospital/north', value=2.5, step=3, time_s=9.0)]
    >>> [p.tag for p in points(Metric(name="loss", value=None, step=1, tokens=8, time=0))]
    ['tokens']
    """
    numbers = {event.name: event.value}
    numbers |= event.model_dump(exclude=_NO_CURVES, exclude_unset=True)
    of = f"-by-hospital/{event.hospital}" if event.hospital else ""
    return [
        # MLflow's characters, which TensorBoard takes too.
        Point(re.sub(r"[^\w. /-]", "_", f"{name}{of}"), float(value), event.place, event.time)
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


class Curves:
    """Follows a run's metrics.jsonl from a thread of its own; a tracker that fails ends no run.

    Args:
        run: The run's directory.
        tracker: Gets the points.
        named: ``run.tracker=...``, for what is said about it.
        console: Where a failing tracker is named.
    """

    def __init__(
        self, run: RunDirectory, tracker: Tracker, *, named: str, console: Console
    ) -> None:
        self.file = run.path / METRICS
        self.tracker, self.named, self.console = tracker, named, console
        self._inode = self._offset = 0
        self._given_up = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="curves", daemon=True)

    def __enter__(self) -> "Curves":
        """Begin; what is there already is told at once.

        Raises:
            UserError: if the tracker cannot be had.
        """
        try:
            self.tracker.begin()
        except Exception as error:
            raise UserError(
                f"{self.named} cannot begin: {_in_one_line(error)}",
                fix="mend its place or its server, or set run.tracker=none",
            ) from error
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        """Tell the rest, and that it is the rest."""
        self._end.set()
        self._thread.join()
        self._try(lambda: self.tracker.end(finished=kind is None))

    def _follow(self) -> None:
        while not self._end.wait(SECONDS):
            self._try(self.tell)
        self._try(self.tell)

    def tell(self) -> None:
        """Tell what is new in metrics.jsonl."""
        if not self.file.exists():
            return
        with self.file.open("rb") as lines:
            state = os.fstat(lines.fileno())
            if self._inode not in (0, state.st_ino) or state.st_size < self._offset:
                self.tracker.begin()
                self._offset = 0
            self._inode = state.st_ino
            lines.seek(self._offset)
            content = lines.read()
        # A line that is being written is told the next time.
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            events = (Metric.read(line, what=METRICS) for line in whole.splitlines())
            self.tracker.tell([point for event in events for point in points(event)])
            self._offset += len(whole)

    def _try(self, work: Callable[[], None]) -> None:
        if self._given_up:
            return
        try:
            work()
        except Exception as error:
            self._given_up = True
            self.console.say(
                f"{self.named} is given up: {_in_one_line(error)}; metrics.jsonl has every figure",
                style="yellow",
            )


def curves(
    run: RunDirectory,
    config: Config,
    *,
    source: str,
    command_line: Sequence[str],
    console: Console = SILENT,
) -> AbstractContextManager[object]:
    """Return what draws a run's curves while its block runs; nothing with ``run.tracker=none``.

    Args:
        run: The run's directory.
        config: The run's.
        source: Tag of its data.
        command_line: As the person gave it.
        console: Where a failing tracker is named.

    Raises:
        UserError: as ``check_tracker``.
    """
    address = check_tracker(config, command_line, source=source)
    kind, configuration = config.run.tracker, public_configuration(config)
    if kind == NONE:
        return contextlib.nullcontext()
    tracker: Tracker
    if kind == TENSORBOARD:
        tracker = TensorBoard(run.path / TENSORBOARD, configuration)
    else:
        tracker = MLflow(
            address or (run.path / MLFLOW).as_uri(),
            name=run.path.name,
            note=run.path / MLFLOW_NOTE,
            configuration=configuration,
        )
    return Curves(run, tracker, named=f"run.tracker={kind}", console=console)


def check_tracker(config: Config, command_line: Sequence[str], *, source: str = "") -> str:
    """Check that the tracker is installed, and that the run's figures may go where it is.

    Args:
        config: The run's.
        command_line: As the person gave it: a host that is not loopback counts from there alone.
        source: Tag of the data, once it is known.

    Returns:
        The server's address; empty without one.

    Raises:
        UserError: if not.
    """
    run = config.run
    if run.tracker_url and run.tracker != MLFLOW:
        raise UserError(
            f"run.tracker-url is set, and run.tracker={run.tracker}",
            allowed="a server with run.tracker=mlflow",
            fix="set run.tracker=mlflow, or leave run.tracker-url empty",
        )
    if run.tracker != NONE:
        require_extra(
            run.tracker,
            needed_by=f"run.tracker={run.tracker}",
            without="set run.tracker to none",
        )
    if not run.tracker_url:
        return ""
    endpoint = check_endpoint(run.tracker_url, source=SYNTHETIC, key="run.tracker-url")
    if endpoint.loopback:
        return endpoint.url
    if f"run.tracker-url={run.tracker_url}" not in {
        argument.removeprefix("--set=") for argument in command_line
    }:
        raise UserError(
            f"run.tracker-url: {endpoint.host} is not loopback, and was not named on the command "
            "line",
            allowed="127.0.0.0/8, ::1 or localhost in a file; any host on the command line",
            fix="leave it out of the file, and add --set run.tracker-url=ADDRESS",
        )
    if protects(config):
        raise UserError(
            f"run.tracker-url={endpoint.host} is not loopback, and privacy is on: figures of the "
            "training stay on this machine",
            fix="leave run.tracker-url empty",
        )
    if source and not handling_of(source).is_open:
        _check_attested(run.tracker_agreement, endpoint)
    return endpoint.url


def with_tracker(begun: RunConfig, now: RunConfig) -> RunConfig:
    """Return a run's settings with the tracker that it is to go on with, which may be another."""
    keys = ("tracker", "tracker_url", "tracker_agreement")
    return replace(begun, **{key: getattr(now, key) for key in keys})


def _check_attested(agreement: str, endpoint: Endpoint) -> None:
    if len(agreement.strip()) < SHORTEST_AGREEMENT:
        raise UserError(
            f"run.tracker-url={endpoint.host} is not loopback, and the run's data counts as "
            "credentialed",
            allowed="a loopback server, or run.tracker-agreement: the agreement that covers the "
            f"host, in at least {SHORTEST_AGREEMENT} characters",
            fix="leave run.tracker-url empty, or set run.tracker-agreement",
        )
    if not endpoint.url.startswith("https:"):
        raise UserError(
            f"run.tracker-url={endpoint.host} would get figures of credentialed data over http",
            allowed="https",
            fix="use the https address of the server",
        )


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:LONGEST_TEXT]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
