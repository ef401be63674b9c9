"""How far a run has come when something fails, in one line that says how to go on.

What was trained is never lost in words: a failure after training says that training is done, where
B is, what failed and the command that goes on.
"""

import contextlib
import importlib
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping

from common.errors import DiskFull, FedrxError, RunFailed, UserError
from common.quick_imports import quick_imports
from common.rundir import TRAINED, RunDirectory
from sim.process.failures import StageFailed, described
from sim.process.progress import Console

TRAINING, EVALUATION, REPORT, AUDIT = "training", "evaluation", "report", "audit"
COMPARISON = "comparison"
"""Of runs that are put together: all are trained and answered, and their figures are compared."""
ANSWERS = "the answers"
AFTER_TRAINING = {
    TRAINED: ANSWERS,
    EVALUATION: ANSWERS,
    COMPARISON: "the comparison",
    REPORT: "the report",
}
"""Stages of status.json in which training is done, and what they are about."""
SLOW_IMPORTS = (
    *("transformers.models.llama.modeling_llama", "transformers.generation"),
    *("sklearn.linear_model", "matplotlib.figure", "matplotlib.backends.backend_svg"),
)
"""What answers and report import first: seconds of a core."""
IMPORTS_NICENESS = 15


@contextlib.contextmanager
def importing_ahead() -> Iterator[None]:
    """Import what comes after this block in a thread that gives way, while other processes train.

    The block's end waits for the module that is being imported, and no further one is begun: two
    threads that import packages whose modules import each other can see them half made.
    """
    over = threading.Event()

    def work() -> None:
        with contextlib.suppress(OSError):  # Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), IMPORTS_NICENESS)
        with quick_imports():
            for name in SLOW_IMPORTS:
                if over.is_set():
                    return
                # What fails is told where it is used; after Ctrl-C an import can be refused.
                with contextlib.suppress(Exception):
                    importlib.import_module(name)

    thread = threading.Thread(target=work, name="imports")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def resume_command(directory: RunDirectory) -> str:
    """Return the command that goes on with a run."""
    return f"fedrx resume {shlex.quote(str(directory.path))}"


def is_trained(directory: RunDirectory) -> bool:
    """Tell whether a run's training is done and summed up, whatever came after it."""
    status = directory.status()
    done = status.state == "finished" or status.stage in AFTER_TRAINING
    return done and bool(directory.summary().b_sha256)


@contextlib.contextmanager
def reported(
    directory: RunDirectory,
    console: Console | None,
    where: Callable[[], Mapping[str, object]] = dict,
    *,
    again: str,
) -> Iterator[None]:
    """Work on a run that is held alone; where that fails or is interrupted, status.json says so.

    Args:
        directory: The run's directory.
        console: Where a person is told how to go on after an interruption, if anywhere.
        where: How far the run has come, for status.json.
        again: The command that goes on; empty where none does.

    Raises:
        StageFailed: for what fails after training, and for what is nobody's input.
    """
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, ValueError, FedrxError):
            directory.write_status("interrupted", **_place(directory, where))
        if console and again:
            console.say(f"go on with: {again}")
        raise
    except Exception as error:
        failure = _failure(directory, error, again)
        # Where not even the status can be written, the line is what counts.
        with contextlib.suppress(OSError, ValueError, FedrxError):
            if directory.status().state != "finished":
                message = failure.what if isinstance(failure, StageFailed) else str(failure)
                place = _place(directory, where)
                directory.write_status("failed", **place, error=message)
        if failure is error:
            raise
        raise failure from error


@contextlib.contextmanager
def after_training(directory: RunDirectory, what: str, command: str) -> Iterator[None]:
    """Work on a trained run by a command of its own; input that a person can mend passes as it is.

    Args:
        directory: The run's directory.
        what: What is done, such as ``the judge``.
        command: The command, without the run.

    Raises:
        StageFailed: for everything else.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = f"{_kept(directory)}; {what} failed: {described(error, directory)}"
        command = f"{command} {shlex.quote(str(directory.path))}"
        raise StageFailed(text, command=command) from error


def _failure(directory: RunDirectory, error: Exception, again: str) -> FedrxError:
    stage = _stage(directory)
    if isinstance(error, StageFailed):  # of a run inside: what goes on is this one
        return StageFailed(error.what, command=again)
    if again and stage in AFTER_TRAINING:
        what = f"{_kept(directory)}; {AFTER_TRAINING[stage]} failed"
    elif isinstance(error, FedrxError) and not isinstance(error, DiskFull):
        return error
    elif not again:
        return RunFailed(f"the {stage} failed: {described(error, directory)}; fix: start it again")
    else:
        what = "training failed"
    what = f"{what}: {described(error, directory)}"
    if AFTER_TRAINING.get(stage) == ANSWERS:
        what += "; they can be made otherwise, with --set evaluation.KEY=VALUE"
    return StageFailed(what, command=again)


def _place(
    directory: RunDirectory, where: Callable[[], Mapping[str, object]]
) -> Mapping[str, object]:
    """Return a run's stage, and how far it has come, if that can still be read."""
    place = {"stage": _stage(directory)}
    with contextlib.suppress(OSError, ValueError, FedrxError):
        return {**place, **where()}
    return place


def _stage(directory: RunDirectory) -> str:
    """Return the stage that a run is in; of a finished one the report was the last."""
    with contextlib.suppress(OSError, ValueError, FedrxError):
        status = directory.status()
        return REPORT if status.state == "finished" else status.stage or TRAINING
    return TRAINING


def _kept(directory: RunDirectory) -> str:
    names = directory.checkpoint_names()
    place = directory.path / "checkpoints" / names[-1] / "b.safetensors" if names else None
    return f"training is done, B is {f'in {place}' if place else f'below {directory.path}'}"
