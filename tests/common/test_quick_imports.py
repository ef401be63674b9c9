"""Collection is paused while large packages are imported, and no longer."""

import gc
import sys

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
        from module_of_this_test import Kept
    assert gc.isenabled()
    assert not any(one is Kept for one in gc.get_objects())
    del sys.modules["module_of_this_test"]


@pytest.mark.usefixtures("unfrozen")
def test_where_nothing_was_imported_nothing_is_kept_for_good():
    """A training that has ended must be found by the next collection."""
    before = gc.get_freeze_count()
    with quick_imports():
        import gc as known  # noqa: F401
    assert gc.get_freeze_count() == before


def test_collection_goes_on_after_an_error_and_after_a_block_within(monkeypatch):
    with pytest.raises(ImportError), quick_imports():
        import not_there_at_all  # noqa: F401
    assert gc.isenabled()
    with quick_imports():
        with quick_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
