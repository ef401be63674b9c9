"""End what a killed launcher would leave: run as a script beside it, on the far end of a pipe.

Nothing of ours is imported: it starts in a moment, and survives whatever ends the launcher.
"""

import contextlib
import shutil
import sys
import time

import psutil

HOME_VARIABLE = "FLWR_HOME"
"""Names the launch's own folder in every process of it; a resumed run has another."""
QUIET_SECONDS = 2.0
"""So long nothing must be left; what is being started meanwhile is ended too."""


def main(folder: str, home: str) -> None:
    """Wait for the launcher's end; kill every process of its launch, and remove its folder.

    A launcher that says something before its end has left nothing.
    """
    if sys.stdin.read():
        return
    busy = time.monotonic()
    while time.monotonic() - busy < QUIET_SECONDS:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(HOME_VARIABLE) == home:
                    # Ray's agents write their title over their environment: found as children.
                    for one in (*process.children(recursive=True), process):
                        one.kill()
                    busy = time.monotonic()
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
