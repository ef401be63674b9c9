"""How the suite is shared by two processes: when, what stays together, and what goes first."""

from types import SimpleNamespace

import pytest
import two_processes

WHOLE, NAMED = pytest.Config.ArgsSource.TESTPATHS, pytest.Config.ArgsSource.ARGS
UNSAID = {"numprocesses": None, "tx": [], "dist": "no", "collectonly": False, "usepdb": False}


@pytest.mark.parametrize(
    ("source", "changes", "cpus", "expected"),
    [
        (WHOLE, {}, 8, 2),
        (WHOLE, {}, 1, 1),
        (NAMED, {}, 8, None),
        (WHOLE, {"numprocesses": 0}, 8, 0),
        (WHOLE, {"numprocesses": 4}, 8, 4),
        (WHOLE, {"usepdb": True}, 8, None),
        (WHOLE, {"collectonly": True}, 8, None),
    ],
)
def test_the_whole_suite_takes_two_processes_unless_told(
    monkeypatch, source, changes, cpus, expected
):
    monkeypatch.setattr(two_processes, "available_cpus", lambda: cpus)
    option = SimpleNamespace(**{**UNSAID, **changes})
    config = SimpleNamespace(option=option, args_source=source)
    two_processes.pytest_cmdline_main(config)
    assert option.numprocesses == expected


def test_a_process_shares_nothing_further():
    option = SimpleNamespace(**UNSAID)
    worker = SimpleNamespace(option=option, args_source=WHOLE, workerinput={})
    two_processes.pytest_cmdline_main(worker)
    assert option.numprocesses is None


def test_without_xdist_nothing_is_asked_of_it():
    option = SimpleNamespace(collectonly=False, usepdb=False)
    two_processes.pytest_cmdline_main(SimpleNamespace(option=option, args_source=WHOLE))
    assert vars(option) == {"collectonly": False, "usepdb": False}


def item(nodeid, *marks):
    return SimpleNamespace(
        nodeid=nodeid, iter_markers=lambda: [SimpleNamespace(name=mark) for mark in marks]
    )


def test_files_with_real_federations_go_first_and_files_stay_whole():
    items = [
        item("tests/client/test_a.py::test_one", "fast"),
        item("tests/client/test_b.py::test_one", "fast"),
        item("tests/client/test_b.py::test_two", "process"),
        item("tests/sim/flower/test_superlink.py::test_one", "fast"),
        item("tests/sim/flower/test_kill.py::test_one[a::b]", "ray"),
    ]
    names = [one.nodeid for one in items]
    two_processes.pytest_collection_modifyitems(SimpleNamespace(workerinput={}), items)
    assert [one.nodeid for one in items] == [names[3], names[4], names[1], names[2], names[0]]
    shares = [two_processes.share_of(one.nodeid) for one in items]
    real = "federations"
    b, a = "tests/client/test_b.py", "tests/client/test_a.py"
    assert shares == [real, real, b, b, a]


def test_one_process_keeps_the_order():
    items = [item("tests/a.py::test"), item("tests/sim/flower/b.py::test", "ray")]
    names = [one.nodeid for one in items]
    two_processes.pytest_collection_modifyitems(SimpleNamespace(), items)
    assert [one.nodeid for one in items] == names


def test_who_asks_for_the_real_federation_stays_together(request):
    """So that it is made once."""
    asking = {
        one.nodeid.partition("::")[0]
        for one in request.session.items
        if "base" in getattr(one, "fixturenames", ()) and one.get_closest_marker("ray")
    }
    assert asking <= two_processes.FEDERATIONS
    assert all((request.config.rootpath / file).is_file() for file in two_processes.FEDERATIONS)
