"""A hospital runs its own code: bundles are read, compared and never imported."""

import io
import shutil
import subprocess
import sys
import threading
import zipfile
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import SubStatus

import client.bundle
import client.tasks
from client.bundle import ForeignCode, bundle_digest, check_bundle, check_installation
from client.policy import Policy
from common.errors import RunFailed
from common.provenance import source_digest
from sim.flower.bundle import stage_app


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return stage_app(tmp_path_factory.mktemp("app"), version="1.0.0")


@pytest.fixture(scope="module")
def bundle(app) -> bytes:
    return build_fab_from_disk(app)


def changed(bundle: bytes, *, add=(), drop=(), replace=None) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(bundle)) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name not in drop:
                new.writestr(name, (replace or {}).get(name, old.read(name)))
        for name, content in add:
            new.writestr(name, content)
    return target.getvalue()


def test_the_bundle_that_deploy_writes_is_the_installation(bundle):
    """Flower's own build of the staged app, against the digest of the files on this disk."""
    assert check_bundle(bundle) == bundle_digest(bundle) == source_digest()


@pytest.mark.parametrize(
    "change",
    [
        {"add": [("client/extra.py", b"")]},
        {"add": [("common/data/zz.py", b"import os\n")]},
        {"drop": ["client/epsilon_limit.py"]},
        {"replace": {"client/epsilon_limit.py": b"def keep_to_limit(*a, **k): ...\n"}},
        {"replace": {"sim/__init__.py": b""}},
        {"add": [("client/epsilon_limit.py", b"# the same name twice\n")]},
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_another_bundle_is_refused(bundle, change):
    with pytest.raises(ForeignCode, match="nothing of (it|the bundle) was run"):
        check_bundle(changed(bundle, **change))


def test_what_is_no_bundle_is_refused(bundle, monkeypatch):
    for broken in (b"", b"PK", bundle[:-40], bundle[: len(bundle) // 2]):
        with pytest.raises(ForeignCode, match="cannot be read"):
            check_bundle(broken)
    monkeypatch.setattr(client.bundle, "MOST_BYTES", 1000)
    with pytest.raises(ForeignCode, match="not one of FedRx"):
        check_bundle(bundle)


@pytest.mark.process
def test_a_bundle_is_read_without_importing_or_writing_anything(app, tmp_path):
    """In a process of its own, from a bundle whose every module would leave a mark."""
    marked, mark = tmp_path / "fedrx", tmp_path / "ran"
    shutil.copytree(app, marked)
    for file in marked.rglob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w').close()\n")
    fab = tmp_path / "x.fab"
    fab.write_bytes(build_fab_from_disk(marked))
    code = (
        "import pathlib, sys; from client.bundle import check_bundle\n"
        "try: check_bundle(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "except Exception as error: print(type(error).__name__, 'torch' in sys.modules)\n"
    )
    before = {path.name for path in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", code, fab], capture_output=True, text=True)
    assert done.stdout.split() == ["ForeignCode", "False"], done.stderr
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_policy_names_the_installations_that_may_run():
    own = source_digest()
    assert check_installation(Policy()) == own
    assert check_installation(Policy.model_validate({"allowed-digests": ["0" * 64, own]})) == own
    with pytest.raises(ForeignCode, match="which allowed-digests does not name"):
        check_installation(Policy.model_validate({"allowed-digests": ["0" * 64]}))


# What leaves a hospital when a task fails


class Runtime:
    """Stands for the SuperNode's Runtime API."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def SendTaskHeartbeat(self, request):
        return SimpleNamespace(success=True)


def refusal(status):
    request = httpx.Request("POST", "http://supernode")
    response = httpx.Response(status, request=request)
    return httpx.HTTPStatusError(str(status), request=request, response=response)


class Forgetful(Runtime):
    """It has given the task up."""

    def __init__(self, answer):
        self.answer, self.beats = answer, threading.Semaphore(0)

    def SendTaskHeartbeat(self, request):
        self.beats.release()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def answered(monkeypatch):
    """Answer one task by a function; returns the reply and how the task ended."""

    def answer(respond, runtime=None):
        sent, runtime = {}, runtime or Runtime()
        message = Message(RecordDict({"config": ConfigRecord({"round": 0})}), 1, "query")
        context = Context(1, 1, {}, RecordDict(), {})
        bundle = type("Bundle", (), {"content": b"fab"})
        monkeypatch.setattr(client.tasks, "_runtime", lambda *args: runtime)
        monkeypatch.setattr(
            client.tasks, "pull_task_input", lambda runtime: (message, context, None, bundle)
        )
        monkeypatch.setattr(
            client.tasks, "push_message", lambda runtime, reply, context: sent.update(reply=reply)
        )
        monkeypatch.setattr(
            client.tasks,
            "push_task_output",
            lambda runtime, context, status, details: sent.update(status=status, details=details),
        )
        client.tasks._answer_one("127.0.0.1:1", "token", respond)
        return sent

    return answer


def test_a_refusal_is_told_and_what_is_not_ours_is_not(answered):
    def refuse(message, context, bundle):
        raise RunFailed("nothing of the bundle was run")

    def fail(message, context, bundle):
        raise ValueError("patient 10023456")

    told = answered(refuse)
    assert isinstance(told["reply"].error, Error)
    assert "nothing of the bundle was run" in told["reply"].error.reason
    assert told["status"] == SubStatus.FAILED
    told = answered(fail)
    assert "10023456" not in str(told)
    assert "ValueError" in told["reply"].error.reason
    good = answered(lambda message, context, bundle: Message(RecordDict(), reply_to=message))
    assert (good["status"], good["details"]) == (SubStatus.COMPLETED, "")
    assert good["reply"].has_content()


@pytest.mark.parametrize(
    "answer",
    [SimpleNamespace(success=False), *map(refusal, (403, 500))],
)
def test_a_task_that_the_supernode_has_given_up_ends_no_hospital(answered, answer):
    """Flower's own heartbeat beats before the task is done; after an error it does so again."""
    runtime = Forgetful(answer)

    def respond(message, context, bundle):
        for _ in range(2 if isinstance(answer, Exception) else 1):
            assert runtime.beats.acquire(timeout=30)
        return Message(RecordDict(), reply_to=message)

    assert answered(respond, runtime)["status"] == SubStatus.COMPLETED
