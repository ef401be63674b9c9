"""The cause that a failed simulation names, on logs as Python, Flower and Ray write them."""

import logging
import traceback

from sim.flower.flower_log import LONGEST_CAUSE, true_cause


def printed(raise_it) -> str:
    """What Python itself prints of an exception."""
    try:
        raise_it()
    except Exception:
        return traceback.format_exc()
    raise AssertionError


def ray_cannot_start():
    try:
        try:
            raise PermissionError(13, "Permission denied", "/env/ray/core/src/ray/gcs/gcs_server")
        except PermissionError as error:
            raise RuntimeError("Simulation Runtime crashed.") from error
    except RuntimeError as error:
        raise RuntimeError("An error was encountered. Ending simulation.") from error


def tmpdir_is_not_ascii():
    try:
        "/tmp/ü".encode("ascii")
    except UnicodeEncodeError as error:
        raise RuntimeError("An error was encountered. Ending simulation.") from error


def in_flower(text: str) -> str:
    """The same as Flower's coloured logger writes it, with lines before and after."""
    coloured = f"\x1b[91mERROR \x1b[0m:     {text}"
    return f"\x1b[92mINFO \x1b[0m:      Starting Flower Simulation\n{coloured}\x1b[91mERROR \x1b[0m"


def test_the_first_of_a_chain_is_the_cause():
    cause = "PermissionError: [Errno 13] Permission denied: '/env/ray/core/src/ray/gcs/gcs_server'"
    assert true_cause(printed(ray_cannot_start)) == cause
    assert true_cause(in_flower(printed(ray_cannot_start))) == cause
    named = true_cause(in_flower(printed(tmpdir_is_not_ascii)))
    assert named.startswith("UnicodeEncodeError: 'ascii' codec can't encode character '\\xfc'")


def test_the_last_chain_counts():
    log = in_flower(printed(tmpdir_is_not_ascii)) + "\n\n" + in_flower(printed(ray_cannot_start))
    assert true_cause(log).startswith("PermissionError")


def full_disk():
    raise OSError(28, "No space left on device")


def test_an_error_in_a_handler_names_both():
    def fail():
        try:
            raise KeyError("session")
        except KeyError:
            full_disk()

    assert true_cause(printed(fail)) == (
        "OSError: [Errno 28] No space left on device (while handling KeyError: 'session')"
    )


def test_a_single_exception_and_none():
    assert true_cause(printed(lambda: [][1])) == "IndexError: list index out of range"
    assert true_cause("") == ""
    assert true_cause("all went well\n") == ""
    assert true_cause("Traceback (most recent call last):\n  File") == ""


def test_what_ray_brings_from_a_worker_is_the_workers_own():
    log = (
        "Traceback (most recent call last):\n"
        '  File "backend.py", line 3, in process_message\n'
        "ray.exceptions.RayTaskError(ClientAppException): \x1b[36mray::ClientAppActor.run()"
        "\x1b[39m (pid=5, ip=127.0.0.1)\n"
        '  File "client/app.py", line 9, in train\n'
        "    work()\n"
        "ModuleNotFoundError: No module named 'torch'\n"
        "\x1b[91mERROR \x1b[0m:     Exit Code: 700\n"
    )
    assert true_cause(log) == "ModuleNotFoundError: No module named 'torch'"


def test_lines_of_the_log_after_an_exception_are_not_its():
    log = printed(ray_cannot_start) + "INFO: done\n2026-01-01 uvicorn: stopped\n"
    assert true_cause(log).startswith("PermissionError")


def test_a_long_cause_is_cut():
    def fail():
        raise ValueError("x" * 9000)

    assert len(true_cause(printed(fail))) == LONGEST_CAUSE


def test_logged_with_exc_info_as_flower_does(caplog):
    """Flower's ``log(ERROR, ..., exc_info=error)`` puts the chain below its own line."""
    try:
        ray_cannot_start()
    except RuntimeError as error:
        logging.getLogger("flwr").error("Simulation raised an exception", exc_info=error)
    assert true_cause(caplog.text).startswith("PermissionError")
