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
        if not self.is_terminal:
            return None
        bar = _Bar(
            progress.TextColumn(label),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=self,
        )
        bar.add_task(label, total=total, completed=done, note="")
        bar.start()
        return bar


class _Bar(progress.Progress):
    def fill(self, done: int, note: str) -> None:
        self.update(self.task_ids[0], completed=done, note=note)
