"""Importing large packages without Python's garbage collector beside it."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import in this block with collection paused: torch and transformers take a quarter less.

    What they define stays for good: it is put where no later collection, and none at the process's
    end, walks through it (``gc.freeze``).

    >>> with quick_imports():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    collecting, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if collecting:
            gc.enable()
