"""Where credentialed data may go; names and addresses that pretend to be loopback."""

import pytest

from common.config import Config
from common.errors import UserError
from common.evaluation.judge.gate import Statement, check_endpoint, source_of_run
from common.evaluation.judge.judging import judge_run
from common.evaluation.judge.questions import questions_of
from common.rundir import RunDirectory

AGREEMENT = "Enterprise agreement 2031-07 with zero retention"


def local(host, port):
    assert host == "localhost"
    return ["::1", "127.0.0.1"]


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://127.8.9.1/v1/", "http://127.8.9.1:80/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://[::ffff:127.0.0.1]:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://localhost:9/v1", "http://[::1]:9/v1"),
        ("http://LOCALHOST.:9/v1", "http://[::1]:9/v1"),
        ("https://localhost:9/v1", "https://localhost:9/v1"),
    ],
)
def test_loopback_is_allowed_and_pinned(url, target):
    endpoint = check_endpoint(url, source="credentialed", resolver=local)
    assert endpoint.loopback
    assert endpoint.url == target


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1",
        "https://localhost.evil.example/v1",
        "https://127.0.0.1.nip.io/v1",
        "https://localtest.me/v1",
        "https://evil-localhost/v1",
        "http://0.0.0.0:8000/v1",
        "http://10.0.0.5:8000/v1",
        "http://[::]:8000/v1",
        "http://[::ffff:10.0.0.5]:8000/v1",
        "http://2130706433:8000/v1",
        "http://0x7f000001/v1",
        "http://127.1/v1",
        "http://0177.0.0.1/v1",
        "http://128.0.0.1/v1",
    ],
)
@pytest.mark.parametrize("source", ["credentialed", "unknown", ""])
def test_credentialed_data_goes_nowhere_else(url, source):
    with pytest.raises(UserError, match="not loopback"):
        check_endpoint(url, source=source, resolver=local)
    for is_open in ("demo", "synthetic"):
        assert not check_endpoint(url, source=is_open, resolver=local).loopback


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost@evil.example/v1",
        "http://127.0.0.1:8000@evil.example/v1",
        "http://evil.example\\@127.0.0.1/v1",
        "http://127.0.0.1/v1?x=1",
        "http://127.0.0.1#@evil.example/v1",
        "http://127.0.0.1\t.evil.example/v1",
        "http://127.0.0.1%2eevil.example/v1",
        "http://[::1%25eth0]/v1",
        "ftp://127.0.0.1/v1",
        "http://[::1]evil.com/",
        "127.0.0.1:8000",
        "http://",
        "http:///v1",
        "http://127.0.0.1:99999/v1",
        "http://127.0.0.1:x/v1",
        "http://ⓛocalhost/v1",
        "",
    ],
)
def test_odd_addresses_are_refused_for_all_data(url):
    with pytest.raises(UserError, match="plain http"):
        check_endpoint(url, source="synthetic", resolver=local)


@pytest.mark.parametrize("addresses", [["10.1.2.3"], ["127.0.0.1", "10.1.2.3"], []])
def test_a_localhost_that_leads_elsewhere_is_refused(addresses):
    with pytest.raises(UserError, match="does not resolve to loopback"):
        check_endpoint(
            "http://localhost:8000/v1", source="credentialed", resolver=lambda h, p: addresses
        )


def test_localhost_is_tried_at_each_of_its_addresses(server):
    endpoint = check_endpoint(
        f"http://localhost:{server.port}/v1", source="credentialed", resolver=local
    )
    assert endpoint.url == server.url


def test_a_statement_opens_its_own_host_alone_over_https():
    url = "https://judge.hospital.example/v1"
    statement = Statement(host="Judge.Hospital.Example", agreement=AGREEMENT)
    endpoint = check_endpoint(url, source="credentialed", statement=statement)
    assert endpoint.statement == statement
    assert not endpoint.loopback
    with pytest.raises(UserError, match="names host"):
        check_endpoint("https://other.example/v1", source="credentialed", statement=statement)
    with pytest.raises(UserError, match="plain http"):
        check_endpoint(
            "http://judge.hospital.example/v1", source="credentialed", statement=statement
        )
    with pytest.raises(UserError, match="too short"):
        check_endpoint(
            url, source="credentialed", statement=Statement(host=statement.host, agreement="yes")
        )


def test_in_doubt_the_source_is_credentialed(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    assert source_of_run(run) == "credentialed"

    def found(summary, data):
        run.write_json("summary.json", summary)
        run.write_json("data.json", data)
        return source_of_run(run)

    assert found({"source": "synthetic"}, {"source": "synthetic"}) == "synthetic"
    assert found({"source": "synthetic"}, {"source": "demo"}) == "demo"
    assert found({}, {"source": "demo"}) == found({"source": "demo"}, {}) == "demo"
    for documents in (
        ({}, {}),
        ({"source": "credentialed"}, {"source": "demo"}),
        ({"source": "demo"}, {"source": "credentialed"}),
        ({"source": "Demo"}, {}),
        ({"source": None}, {}),
        ({"source": ["demo"]}, {}),
    ):
        assert found(*documents) == "credentialed"


@pytest.mark.parametrize("source", ["credentialed", None, "Synthetic"])
def test_a_credentialed_run_sends_nothing_abroad(make_run, judge_config, kit, source, monkeypatch):
    """Not even a look-up of the name or a connection is made."""
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("the network was used")

    run = make_run([kit.line("case-1", "fedrx", ["Insulin"])], source=source)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UserError, match="not loopback"):
        questions_of(run, judge_config(base_url="https://api.openai.com/v1"))


def test_a_credentialed_run_goes_to_loopback(server, make_run, judge_config, kit):
    run = make_run([kit.line("case-1", "fedrx", ["Insulin"])], source="credentialed")
    result = judge_run(run, questions_of(run, judge_config())).as_json()
    assert result["judgements"]["scored"] == 1
    assert result["agreement_stated"] is False


def test_a_statement_is_stored_with_the_run(server, make_run, judge_config, kit, monkeypatch):
    """The host is remote by name; the test answers in its place, on loopback."""
    from dataclasses import replace

    run = make_run([kit.line("case-1", "fedrx", ["Insulin"])], source="credentialed")
    statement = Statement(host="judge.example", agreement=AGREEMENT)
    questions = questions_of(
        run, judge_config(base_url="https://judge.example/v1"), statement=statement
    )
    questions = replace(
        questions, endpoint=replace(questions.endpoint, url=server.url, loopback=True)
    )
    result = judge_run(run, questions).as_json()
    assert result["agreement_stated"] is True
    (kept,) = run.lines("judge/statements.jsonl")
    assert (kept["host"], kept["agreement"]) == ("judge.example", AGREEMENT)
    assert (kept["source"], kept["server"]) == ("credentialed", "https://judge.example:443/v1")
    assert kept["time"]
