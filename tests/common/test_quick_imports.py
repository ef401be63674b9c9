"""Collection is paused while large packages are imported, and no longer."""

import gc
import importlib
import sys
import weakref

import pytest

from common.quick_imports import quick_imports


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("unfrozen")
def test_what_is_imported_is_walked_through_no_more(tmp_path, monkeypatch):
    (tmp_path / "module_of_this_test.py").write_text("class Kept: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with quick_imports():
        kept = importlib.import_module("module_of_this_test").Kept
    assert gc.isenabled()
    assert not any(one is kept for one in gc.get_objects())
    del sys.modules["module_of_this_test"]


@pytest.mark.usefixtures("unfrozen")
def test_an_import_s_failed_try_keeps_none_of_its_caller_s_variables(tmp_path, monkeypatch):
    (tmp_path / "module_of_this_test.py").write_text(
        "try:\n    import not_there_at_all\nexcept ImportError as error:\n    held = [error]\n"
        "    held.append(held)\n    del held\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    class Backbone: ...

    def caller():
        with quick_imports():
            importlib.import_module("module_of_this_test")
        opened = Backbone()
        return weakref.ref(opened)

    alive = caller()
    gc.collect()
    del sys.modules["module_of_this_test"]
    assert alive() is None


@pytest.mark.usefixtures("unfrozen")
def test_where_nothing_was_imported_nothing_is_kept_for_good():
    """A training that has ended must be found by the next collection."""
    before = gc.get_freeze_count()
    with quick_imports():
        importlib.import_module("gc")
    assert gc.get_freeze_count() == before


def test_collection_goes_on_after_an_error_and_after_a_block_within():
    with pytest.raises(ImportError), quick_imports():
        importlib.import_module("not_there_at_all")
    assert gc.isenabled()
    with quick_imports():
        with quick_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
