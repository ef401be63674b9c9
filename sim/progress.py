"""Progress of a federation, read from its run directory: a bar on a terminal, else plain lines."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from common.rundir import RunDirectory

PLAIN_SECONDS = 15.0


class RunProgress:
    """Shows local steps done of all, time left, and each round's validation loss.

    Args:
        console: Where to show it.
        run: The run directory that server and hospitals write to.
        steps: Local optimizer steps of the whole run, over all hospitals.
        rounds: Rounds of the whole run.
    """

    def __init__(self, console: Console, run: RunDirectory, *, steps: int, rounds: int) -> None:
        self.console, self.run, self.steps, self.rounds = console, run, steps, rounds
        self._offsets: dict[Path, int] = {}
        self._done = 0
        self._seen_events = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: Any = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("local steps"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("steps", total=steps)

    def __enter__(self) -> "RunProgress":
        """Start showing."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop showing; everything seen so far stays on the screen."""
        self.tick()
        if self._bar:
            self._bar.stop()

    def tick(self) -> None:
        """Read what is new and show it."""
        for file in (self.run.path / "hospitals").glob("*/steps.jsonl"):
            self._done += self._new_lines(file)
        self._show_events()
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"local steps {self._done}/{self.steps}{self._left()}")

    def _new_lines(self, file: Path) -> int:
        with file.open("rb") as lines:
            lines.seek(self._offsets.get(file, 0))
            content = lines.read()
        self._offsets[file] = self._offsets.get(file, 0) + len(content)
        return content.count(b"\n")

    def _left(self) -> str:
        if not self._done:
            return ""
        seconds = (time.monotonic() - self._started) / self._done * (self.steps - self._done)
        return f", about {seconds:.0f} s left"

    def _show_events(self) -> None:
        events = self.run.metrics()
        for event in events[self._seen_events :]:
            if event["name"] == "validation-loss" and "hospital" not in event:
                moment = (
                    "untrained" if event["round"] == 0 else f"round {event['round']}/{self.rounds}"
                )
                self.console.print(f"{moment}: validation loss {event['value']:.4f}")
            elif event["name"] == "refused":
                self.console.print(
                    f"round {event['round']}: {event['hospital']} refused: {event['value']}",
                    style="yellow",
                    markup=False,
                )
        self._seen_events = len(events)
