"""The user's cache folder."""

import os
from pathlib import Path


def fedrx_cache() -> Path:
    """Return the cache folder: ``FEDRX_CACHE``, else ``fedrx`` in the XDG cache."""
    chosen = os.environ.get("FEDRX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedrx"
