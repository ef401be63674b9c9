"""Who draws a run's curves: TensorBoard's event files, or an MLflow run.

Each beginning replaces what was told before, so a run that goes on has every step once. A tracker
is told numbers and the public configuration (``common.config``); texts stay in the run directory.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.config import Config
from common.configio import Scalar, file_keys, flatten, toml_scalar
from common.files import write_json
from common.records import Record
from sim.flower.child_environment import ask_loopback_directly

UNTOLD = ("run.", "judge.")
"""Sections that name places and servers: no tracker is told them, nor keys of files."""
_AT_ONCE = 100
"""MLflow's largest number of parameters in one call."""


class Point(NamedTuple):
    """One number of a curve."""

    tag: str
    value: float
    step: int
    """Optimizer step of a single run, round of a federation."""
    time_s: float
    """Seconds since 1970."""


class Tracker(Protocol):
    """Draws curves."""

    def begin(self) -> None:
        """Forget what was told, and begin anew."""

    def tell(self, points: Sequence[Point]) -> None:
        """Add points; they can be seen when this returns."""

    def end(self, *, finished: bool) -> None:
        """Say that no more will come."""


def public_configuration(config: Config) -> dict[str, Scalar]:
    """Return what a tracker is told of a configuration: no folder and no server.

    >>> "train.seed" in public_configuration(Config())
    True
    >>> "data.path" in public_configuration(Config())
    False
    """
    untold = (*UNTOLD, *file_keys())
    return {k: v for k, v in flatten(config).items() if not k.startswith(untold)}


class TensorBoard:
    """Event files in a folder of the run; read them with ``tensorboard --logdir``.

    Args:
        folder: For the event files alone.
        configuration: Shown among the texts.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Scalar]) -> None:
        self.folder, self.configuration = folder, configuration
        self._writer: Any = None

    def begin(self) -> None:
        """Begin a file that replaces those before it."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer:
            self._writer.close()
        earlier = list(self.folder.glob("events.out.tfevents.*"))
        # A reader that is open drops what it has read of steps from 0 on.
        self._writer = SummaryWriter(str(self.folder), purge_step=0)
        lines = [f"    {key} = {toml_scalar(value)}" for key, value in self.configuration.items()]
        self._writer.add_text("configuration", "\n".join(lines), 0)
        self._writer.flush()
        for file in earlier:
            file.unlink()

    def tell(self, points: Sequence[Point]) -> None:
        """Add points as scalars (fp32, as TensorBoard holds them)."""
        for point in points:
            self._writer.add_scalar(point.tag, point.value, point.step, walltime=point.time_s)
        self._writer.flush()

    def end(self, *, finished: bool) -> None:
        """Close the file."""
        self._writer.close()


class MlflowRun(Record):
    """mlflow.json: which MLflow run this is, and where."""

    server: str
    """Empty for files."""
    run_id: str


class MLflow:
    """One MLflow run, in files of the run directory or on a server.

    Args:
        address: A server's, or a ``file:`` one.
        name: Of the run, for people.
        note: File that keeps which MLflow run this is.
        configuration: Becomes the run's parameters.
    """

    def __init__(
        self, address: str, *, name: str, note: Path, configuration: Mapping[str, Scalar]
    ) -> None:
        self.address, self.name, self.note = address, name, note
        self.configuration = configuration
        self._run_id = ""
        self._client: Any = None

    def begin(self) -> None:
        """Make a run, in place of the one that this run directory had on the same server."""
        _prepare_environment()
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self.address, registry_uri=self.address)
        earlier = None
        if self.note.exists():
            earlier = MlflowRun.read(self.note.read_bytes(), what=self.note.name)
        # Files go with the run directory, wherever it is moved.
        server = "" if self.address.startswith("file:") else self.address
        if earlier and earlier.server == server:
            # A person may have deleted it.
            with contextlib.suppress(MlflowException):
                self._client.delete_run(earlier.run_id)
        run = self._client.create_run(self._experiment(), run_name=self.name)
        self._run_id = run.info.run_id
        write_json(self.note, MlflowRun(server=server, run_id=self._run_id).as_json())
        params = [Param(key, str(value)) for key, value in self.configuration.items()]
        for start in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._run_id, params=params[start : start + _AT_ONCE])

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name("fedrx")
        return str(found.experiment_id if found else self._client.create_experiment("fedrx"))

    def tell(self, points: Sequence[Point]) -> None:
        """Add points as metrics."""
        from mlflow.entities import Metric

        metrics = [Metric(p.tag, p.value, round(p.time_s * 1000), p.step) for p in points]
        for start in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _AT_ONCE])

    def end(self, *, finished: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")


def _prepare_environment() -> None:
    """Set what mlflow reads when it is imported and used."""
    # It would tell its makers about each use.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    # Files need no database and no further package.
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    # A server that is gone must not hold the end of a run for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    ask_loopback_directly()
