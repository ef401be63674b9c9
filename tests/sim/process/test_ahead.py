"""Imports beside other work: in the block, done at its end, and no concern of who waits."""

import sys
import threading

import pytest

from sim.process.ahead import imported_meanwhile

MODULE = "from threading import current_thread\nBY = current_thread().name\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "needed_later.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "needed_later"
    sys.modules.pop("needed_later", None)


def test_what_is_needed_later_is_there_at_the_end_of_the_block(module):
    with imported_meanwhile(["a_module_that_is_not_there", module]):
        pass
    assert sys.modules[module].BY == "imports"
    assert "imports" not in {thread.name for thread in threading.enumerate()}


def test_an_interruption_passes_when_the_imports_are_done(module):
    with pytest.raises(KeyboardInterrupt), imported_meanwhile([module]):
        raise KeyboardInterrupt
    assert module in sys.modules
