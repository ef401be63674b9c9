"""Imports that are needed later, while this process waits for others."""

import contextlib
import importlib
import threading
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def imported_meanwhile(modules: Sequence[str]) -> Iterator[None]:
    """Import modules in a thread beside what is done in the block, which ends no earlier.

    Args:
        modules: Dotted names. One that cannot be imported fails where it is used.
    """

    def work() -> None:
        for name in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    thread = threading.Thread(target=work, name="imports")
    thread.start()
    try:
        yield
    finally:
        thread.join()
