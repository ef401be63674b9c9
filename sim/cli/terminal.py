"""The terminal: the only place that prints."""

from typing import Any

from rich.console import Console


class Terminal(Console):
    """Prints what it is told as it is: what stands in brackets or looks like a figure is text.

    Args:
        how: As of rich's console, for instance ``stderr``.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(soft_wrap=True, markup=False, emoji=False, highlight=False, **how)

    def say(self, *parts: object, style: str = "") -> None:
        """Print lines and tables, one below the other."""
        for part in parts:
            self.print(part, style=style or None)
