"""The terminal: the only place that prints."""

from typing import Any

import rich.console
from rich import progress

from sim.process.progress import Bar, Console


class Terminal(rich.console.Console, Console):
    """Prints what it is told as it is: what stands in brackets or looks like a figure is text."""

    def __init__(self, **how: Any) -> None:
        super().__init__(soft_wrap=True, markup=False, emoji=False, highlight=False, **how)

    def say(self, *parts: object, style: str = "", error: bool = False) -> None:
        """Print lines and tables, one below the other."""
        place = Terminal(stderr=True) if error else self
        for part in parts:
            place.print(part, style=style or None)

    def bar(self, label: str, total: int, *, done: int) -> Bar | None:
        """Draw a bar with the time left, on a terminal."""
        return _Bar(self, label, total, done) if self.is_terminal else None


class _Bar:
    def __init__(self, terminal: Terminal, label: str, total: int, done: int) -> None:
        self._bars = progress.Progress(
            progress.TextColumn(label),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=terminal,
        )
        self._task = self._bars.add_task(label, total=total, completed=done, note="")
        self._bars.start()

    def update(self, done: int, note: str) -> None:
        self._bars.update(self._task, completed=done, note=note)

    def stop(self) -> None:
        self._bars.stop()
