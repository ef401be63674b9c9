"""Processes that belong together: when one ends, all end."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from common.errors import RunFailed
from sim.flower.superlink import ending_with_parent

STOP_SECONDS = 10.0


class Children:
    """Child processes of this one, ended together and with it, also if it is killed.

    Args:
        folder: Their working directory.
        environment: Their environment.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str | Path]) -> None:
        """Start one; ``name`` is what a person calls it."""
        self._started[name] = subprocess.Popen(
            command,
            cwd=self.folder,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            preexec_fn=ending_with_parent(),
        )

    def check(self) -> None:
        """Return while all of them live.

        Raises:
            RunFailed: naming the one that has ended.
        """
        for name, process in self._started.items():
            status = process.poll()
            if status is not None:
                raise RunFailed(f"{name} ended (status {status}): all that belongs to it ends too")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End all of them: politely, then by force."""
        for process in self._started.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._started.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
