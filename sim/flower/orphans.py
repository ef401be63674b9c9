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
                    busy = time.monotonic()
                    # Ray's agents write their title over their environment: found as children.
                    for one in stopped_family(process):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            one.kill()
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def stopped_family(process: psutil.Process) -> set[psutil.Process]:
    """Stop a process and all that it has started, so that none has a child unseen.

    A stop takes effect a moment after it is asked for: whoever is listed when all were seen to
    stand is everybody.

    Returns:
        The process and its descendants.
    """
    family = {process}
    standing: set[psutil.Process] = set()
    deadline = time.monotonic() + QUIET_SECONDS
    while not family <= standing and time.monotonic() < deadline:
        for one in family - standing:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()
        standing = {one for one in family if stands(one)}
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= set(process.children(recursive=True))
    return family


def stands(process: psutil.Process) -> bool:
    """Say whether a process is stopped, or has ended."""
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


if __name__ == "__main__":
    main(*sys.argv[1:])
