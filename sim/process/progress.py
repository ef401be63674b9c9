"""What work says while it goes on: lines, and how far it is."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from common.privacy.budget.receipts import privacy_lines
from common.records.run import Metric, StepLine
from common.rundir import METRICS, RunDirectory

PLAIN_SECONDS = 15.0


class Bar(Protocol):
    """Drawn on a terminal, filled in place."""

    def fill(self, done: int, note: str) -> None:
        """Fill it up to ``done``, with a word about it."""

    def stop(self) -> None:
        """Leave it on the screen as it is."""


class Console:
    """Who is told how work goes; this one keeps it to itself. The command line's prints."""

    def say(self, *parts: object, style: str = "", error: bool = False) -> None:
        """Tell a person lines and tables, one below the other.

        Args:
            parts: Lines, or what ``sim.report.terminal`` makes.
            style: A colour, ``bold`` or ``dim``.
            error: Whether it belongs to standard error.
        """

    def bar(self, label: str, total: int, *, done: int) -> Bar | None:
        """Draw a bar, where there is a terminal to draw it on; without one there are lines."""
        return None


SILENT = Console()


class Meter:
    """Shows how much of a known amount is done, and the time left.

    Args:
        console: Where to show it.
        label: What is counted.
        total: All of it.
        done: How much was done before (a resumed run).
    """

    def __init__(self, console: Console, label: str, total: int, *, done: int = 0) -> None:
        self.console, self.label, self.total = console, label, total
        self._first = done
        self._last_line, self._said = time.monotonic(), ""
        self._pace_from: tuple[float, int] | None = None
        self._bar: Bar | None = None

    def __enter__(self) -> "Meter":
        """Start showing."""
        self._bar = self.console.bar(self.label, self.total, done=self._first)
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop showing; everything seen so far stays on the screen."""
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show that ``done`` of the total are finished, with a word about it."""
        if self._bar:
            self._bar.fill(done, note)
            return
        if self._pace_from is None and done > self._first:
            # What came before the first piece (start-up, earlier processes) tells nothing.
            self._pace_from = time.monotonic(), done
        if time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            parts = [f"{self.label} {done}/{self.total}", note, self._left(done)]
            line = ", ".join(part for part in parts if part)
            if line != self._said:
                self.console.say(line)
            self._said = line

    def _left(self, done: int) -> str:
        if self._pace_from is None or done == self._pace_from[1]:
            return ""
        since, first = self._pace_from
        seconds = (time.monotonic() - since) / (done - first) * (self.total - done)
        return f"about {seconds:.0f} s left"


class RunProgress:
    """Shows a federation's local steps, and each round's loss or epsilon, from its run directory.

    Args:
        console: Where to show it.
        run: The run directory that server and hospitals write to.
        steps: Local optimizer steps of the whole run, over all hospitals.
        rounds: Rounds of the whole run.
    """

    def __init__(self, console: Console, run: RunDirectory, *, steps: int, rounds: int) -> None:
        self.console, self.run, self.rounds = console, run, rounds
        self._read: dict[Path, tuple[int, int, int]] = {}
        """Of each hospital's step log: which file it is (inode), bytes read, steps counted."""
        self._seen_events, self._events_version = 0, (0, 0)
        names = run.checkpoint_names()
        self._kept = run.checkpoint_facts(names[-1]).round if names else -1
        self._meter = Meter(console, "local steps", steps, done=self._steps_before())
        self._phase, self._phase_began = "", time.monotonic()
        self.start_seconds: dict[str, float] = {}
        """Seconds of each phase of the start, in order."""

    def __enter__(self) -> "RunProgress":
        """Start showing; what a resumed run keeps from before is called that."""
        self._meter.__enter__()
        # What came after is not shown: the server forgets it, and its round comes again.
        self._events_version = self._version_of_events()
        self._show_events(
            [one for one in self.run.metrics() if one.place <= self._kept], " (from before)"
        )
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop showing; everything seen so far stays on the screen."""
        self.tick()
        self._show_new_events()
        self._meter.__exit__()

    def tick(self) -> None:
        """Read what is new and show it."""
        done = sum(map(self._steps, self._step_logs()))
        if not self._phase:  # what a phase has led to is told after it
            self._show_new_events()
        self._meter.update(done, f"starting: {self._phase}" if self._phase else "")

    def phase(self, name: str) -> None:
        """Show that the start has come to a phase; with an empty name, that it is over."""
        if name == self._phase:
            return
        if self._phase:
            seconds = round(time.monotonic() - self._phase_began, 3)
            self.start_seconds[self._phase] = seconds
            self.console.say(f"start: {self._phase} {seconds:.1f} s", style="dim")
        self._phase, self._phase_began = name, time.monotonic()

    def _step_logs(self) -> list[Path]:
        return list((self.run.path / "hospitals").glob("*/steps.jsonl"))

    def _steps_before(self) -> int:
        """Return the steps of the rounds that stay; those of a round that comes again are none."""
        total = 0
        for file in self._step_logs():
            self._steps(file)
            inode, offset, _ = self._read[file]
            name = str(file.relative_to(self.run.path))
            lines = [StepLine.read(line, what=name) for line in self.run.lines(name)]
            steps = sum(line.round <= self._kept for line in lines)
            self._read[file] = inode, offset, steps
            total += steps
        return total

    def _steps(self, file: Path) -> int:
        with file.open("rb") as lines:
            inode = os.fstat(lines.fileno()).st_ino
            known, offset, steps = self._read.get(file, (inode, 0, 0))
            if known != inode:
                # The hospital has written it anew, without the round that comes again.
                offset = steps = 0
            lines.seek(offset)
            content = lines.read()
        self._read[file] = inode, offset + len(content), steps + content.count(b"\n")
        return self._read[file][2]

    def _show_new_events(self) -> None:
        version = self._version_of_events()
        if version != self._events_version:
            self._events_version = version
            self._show_events(self.run.metrics())

    def _version_of_events(self) -> tuple[int, int]:
        """Return the file's size and time: a repeated round's lines may be as long as before."""
        file = self.run.path / METRICS
        found = file.stat() if file.exists() else None
        return (found.st_size, found.st_mtime_ns) if found else (0, 0)

    def _show_events(self, events: Sequence[Metric], when: str = "") -> None:
        for event in events[self._seen_events :]:
            if event.name == "validation-loss" and event.hospital is None:
                moment = f"round {event.place}/{self.rounds}" if event.place else "untrained"
                self.console.say(f"{moment}: validation loss {event.number:.4f}{when}")
            elif event.name == "round-seconds":
                self._show_spent(event.place, when)
            elif event.name == "refused":
                said = f"round {event.place}: {event.hospital} refused: {event.value}{when}"
                self.console.say(said, style="yellow")
        self._seen_events = len(events)

    def _show_spent(self, server_round: int, when: str) -> None:
        """With privacy on no loss is told; show what the round's hospitals have spent at most."""
        spent = [
            float(line.epsilon) for line in privacy_lines(self.run) if line.round == server_round
        ]
        if spent:
            moment = f"round {server_round}/{self.rounds}"
            self.console.say(f"{moment}: epsilon {max(spent):.3f} spent{when}")
