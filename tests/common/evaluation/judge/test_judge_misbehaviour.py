"""Servers and judges that do everything wrong: no number is made up, nothing hangs or leaks."""

import asyncio
import json
from email.utils import formatdate
from types import SimpleNamespace

import openai
import pytest

from common.errors import RunFailed, UserError
from common.evaluation.judge import client as judge_client
from common.evaluation.judge.cache import Exchanges
from common.evaluation.judge.cost import Meter
from common.evaluation.judge.judging import judge_run
from common.evaluation.judge.questions import questions_of


@pytest.fixture
def run(make_run, kit):
    return make_run([kit.line("case-1", "fedrx", ["Aspirin", "Insulin"])])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(judge_client, "FIRST_WAIT_SECONDS", 0.01)


def entry(drug="Aspirin", suitable=True, reason="r"):
    return {"drug": drug, "suitable": suitable, "reason": reason}


def reply(*entries):
    return json.dumps({"drugs": list(entries)})


BAD_REPLIES = {
    "prose": ("I think all of these are fine.", "not-json"),
    "half": ('{"drugs": [{"drug": "Aspirin"', "not-json"),
    "two objects": (reply(entry()) + reply(entry("Insulin")), "not-json"),
    "list": ("[]", "not-the-schema"),
    "no list": ('{"drugs": {"Aspirin": true}}', "not-the-schema"),
    "yes": (reply(entry(suitable="yes"), entry("Insulin")), "not-the-schema"),
    "one": (reply(entry(suitable=1), entry("Insulin")), "not-the-schema"),
    "no reason": (reply({"drug": "Aspirin", "suitable": True}, entry("Insulin")), "not-the-schema"),
    "missing": (reply(entry()), "missing-drug"),
    "none": (reply(), "missing-drug"),
    "extra": (reply(entry(), entry("Insulin"), entry("Heparin")), "foreign-drug"),
    "renamed": (reply(entry("Acetylsalicylic acid"), entry("Insulin")), "foreign-drug"),
    "twice": (reply(entry(), entry(), entry("Insulin")), "repeated-drug"),
    "nothing": ("", "empty"),
    "deep": ('{"drugs": ' + "[" * 100_000, "not-json"),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_is_unscored_after_one_repair(server, run, judge_config, kit, name):
    text, kind = BAD_REPLIES[name]
    server.behave = lambda body, n: kit.Answer(text)
    result = judge_run(run, questions_of(run, judge_config())).as_json()
    assert result["appropriateness"]["fedrx"]["mean"] is None
    assert result["appropriateness"]["fedrx"]["unscored"] == 1
    assert result["judgements"]["problems"] == {kind: 1}
    assert len(server.requests) == 2
    line = run.lines("judge.jsonl")[0]
    assert (line["scored"], line["score"], line["verdicts"]) == (False, None, None)
    judge_run(run, questions_of(run, judge_config()))
    assert len(server.requests) == 2


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_mended_reply_counts(server, run, judge_config, kit, name):
    text, _ = BAD_REPLIES[name]
    server.behave = lambda body, n: kit.Answer(text if n == 0 else kit.verdicts(body))
    result = judge_run(run, questions_of(run, judge_config())).as_json()
    assert result["appropriateness"]["fedrx"]["mean"] == 1
    assert result["judgements"]["repaired"] == 1
    told = server.bodies[1]["messages"]
    assert told[:2] == server.bodies[0]["messages"]
    assert [m["role"] for m in told[2:]] == (["assistant", "user"] if text else ["user"])


def test_fences_thoughts_case_and_order_are_forgiven(server, run, judge_config, kit):
    text = "<think>hm {</think>\n```json\n" + reply(entry("insulin ", False), entry("ASPIRIN"))
    server.behave = lambda body, n: kit.Answer(text + "\n```")
    judge_run(run, questions_of(run, judge_config()))
    verdicts = run.lines("judge.jsonl")[0]["verdicts"]
    assert [(v["drug"], v["suitable"]) for v in verdicts] == [("Aspirin", True), ("Insulin", False)]


ODD_COMPLETIONS = {
    "no choices": b'{"choices": []}',
    "null choices": b'{"choices": null}',
    "null content": b'{"choices": [{"message": {"content": null}}]}',
    "no message": b'{"choices": [{}]}',
    "odd choice": b'{"choices": [3]}',
    "odd usage": b'{"choices": [{"message": {"content": ""}}], "usage": {"prompt_tokens": "9"}}',
    "huge usage": b'{"choices": [{"message": {"content": ""}}], "usage": {"prompt_tokens": 1%s, '
    b'"completion_tokens": 1}}' % (b"0" * 400),
}


@pytest.mark.parametrize("name", ODD_COMPLETIONS)
def test_an_empty_completion_is_an_empty_reply(server, run, judge_config, kit, name):
    server.behave = lambda body, n: kit.Answer(raw=ODD_COMPLETIONS[name])
    result = judge_run(run, questions_of(run, judge_config())).as_json()
    assert result["judgements"]["problems"] == {"empty": 1}
    assert result["usage"]["calls_without_usage"] == 2


def test_a_reply_cut_at_the_token_limit_is_named(server, run, judge_config, kit):
    server.behave = lambda body, n: kit.Answer('{"drugs": [', finish="length")
    result = judge_run(run, questions_of(run, judge_config())).as_json()
    assert result["judgements"]["problems"] == {"cut": 1}


@pytest.mark.parametrize(("asks", "seconds"), [("7", 7.0), (formatdate(130, usegmt=True), 30.0)])
def test_retry_after_is_honoured(server, run, judge_config, kit, asks, seconds):
    clock = kit.StandingClock()
    server.behave = lambda body, n: (
        kit.Answer(status=429, headers={"retry-after": asks}, raw=b"{}")
        if n == 0
        else kit.Answer(kit.verdicts(body))
    )
    result = judge_run(run, questions_of(run, judge_config()), clock=clock)
    assert result.appropriateness["fedrx"].scored == 1
    assert clock.slept == [seconds]


def test_a_pause_that_the_server_asks_for_is_everybodys(
    server, make_run, judge_config, kit, tmp_path
):
    """One call is asked to wait 7 s; one that begins in the meantime is not sent before."""
    server.behave = lambda body, n: (
        kit.Answer(status=429, headers={"retry-after": "7"}, raw=b"{}")
        if n == 1
        else kit.Answer(kit.verdicts(body))
    )
    run = make_run([kit.line(f"case-{n}", "fedrx", [f"Drug {n}"]) for n in range(3)])
    questions, clock = questions_of(run, judge_config()), kit.HeldClock()

    async def ask():
        client = judge_client.JudgeClient(
            questions.endpoint,
            questions.config,
            api_key="",
            meter=Meter(questions.config, spent_usd=0.0),
            exchanges=Exchanges(tmp_path / "exchanges.jsonl"),
            clock=clock,
        )
        first, *others = [questions.first_messages(task) for task in questions.tasks]
        await client.ask("judge-1", first, 0)
        calls = []
        for number, question in enumerate(others, start=1):
            calls.append(asyncio.create_task(client.ask("judge-1", question, 0)))
            while len(clock.slept) < number and not calls[-1].done():
                await asyncio.sleep(0.005)
        before = len(server.requests), list(clock.slept)
        clock.passes(7.0)
        await asyncio.gather(*calls)
        await client.close()
        return before

    assert asyncio.run(ask()) == (2, [7.0, 7.0])
    assert len(server.requests) == 4


def test_what_retry_after_says_is_read():
    assert judge_client.retry_after_seconds({"retry-after": formatdate(130)}, now=100.0) == 30
    assert judge_client.retry_after_seconds({"retry-after": formatdate(70)}, now=100.0) == 0
    for text in ("", "soon", "nan", "inf", f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT"):
        assert judge_client.retry_after_seconds({"retry-after": text}, now=100.0) is None
    assert judge_client.retry_after_seconds({"retry-after": "-3"}, now=100.0) == 0


def test_a_wait_of_an_hour_ends_the_command_with_what_is_done(server, make_run, judge_config, kit):
    def behave(body, number):
        if number < 2:
            return kit.Answer(kit.verdicts(body))
        return kit.Answer(status=429, headers={"retry-after": "3600"}, raw=b"{}")

    server.behave = behave
    run = make_run([kit.line(f"case-{n}", "fedrx", [f"Drug {n}"]) for n in range(6)])
    with pytest.raises(RunFailed, match="3600"):
        judge_run(run, questions_of(run, judge_config(concurrency=1)))
    assert run.read_json("summary.json")["judge"]["judgements"]["scored"] == 2


FAILURES = {
    "status 500": {"status": 500, "raw": b"oops"},
    "status 503": {"status": 503, "raw": b"{}"},
    "status 429": {"status": 429, "raw": b"{}"},
    "closed connection": {"text": "x" * 1000, "close": True},
    "no answer in time": {"text": "x", "delay_seconds": 0.6},
    "an answer that is no chat completion": {"raw": b"<html>hello</html>"},
}


@pytest.mark.parametrize("how", [*FAILURES, "drip"])
def test_a_failure_is_tried_again(server, run, judge_config, kit, how):
    """The wait grows from one try to the next."""
    clock = kit.StandingClock()
    failure = FAILURES.get(how, {"text": "x", "drip_seconds": 0.02})
    server.behave = lambda body, n: kit.Answer(
        **(failure if n < 2 else {"text": kit.verdicts(body)})
    )
    questions = questions_of(run, judge_config(timeout_seconds=0.4))
    assert judge_run(run, questions, clock=clock).appropriateness["fedrx"].mean == 1
    assert len(server.requests) == 3
    assert clock.slept == [0.5, 1.0]


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_that_stays_is_unscored_and_asked_again_later(
    server, run, judge_config, kit, quick, how
):
    server.behave = lambda body, n: kit.Answer(**FAILURES[how])
    config = judge_config(timeout_seconds=0.4, attempts=2)
    result = judge_run(run, questions_of(run, config)).as_json()
    assert result["appropriateness"]["fedrx"]["mean"] is None
    assert result["appropriateness"]["fedrx"]["unscored"] == 1
    assert result["judgements"]["problems"] == {f"server: {how}": 1}
    assert len(server.requests) == 2
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body))
    assert judge_run(run, questions_of(run, config)).appropriateness["fedrx"].mean == 1


def test_a_broken_call_is_charged_at_its_worst_and_a_refused_one_is_not(
    server, run, judge_config, kit, quick
):
    prices = {"output_usd_per_million": 1000.0, "max_output_tokens": 1000, "attempts": 1}
    server.behave = lambda body, n: kit.Answer(status=500, raw=b"{}")
    result = judge_run(run, questions_of(run, judge_config(**prices))).as_json()
    assert result["cost_usd"] == 0
    server.behave = lambda body, n: kit.Answer("x" * 999, close=True)
    result = judge_run(run, questions_of(run, judge_config(**prices))).as_json()
    assert result["cost_usd"] == pytest.approx(1.0)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_calls_that_are_tried_again_stay_below_the_cost_limit(
    server, make_run, judge_config, kit, quick, concurrency
):
    """Each broken call may have cost its worst, 1 USD of replies: a third would pass 2.9."""
    prices = {"output_usd_per_million": 1000.0, "max_output_tokens": 1000}
    server.behave = lambda body, n: kit.Answer("x" * 999, close=True)
    run = make_run([kit.line(f"case-{n}", "fedrx", [f"Drug {n}"]) for n in range(4)])
    config = judge_config(max_cost_usd=2.9, attempts=9, concurrency=concurrency, **prices)
    with pytest.raises(RunFailed, match="max-cost-usd"):
        judge_run(run, questions_of(run, config))
    assert len(server.requests) == 2
    assert run.read_json("summary.json")["judge"]["cost_usd"] == pytest.approx(2.0)
    with pytest.raises(RunFailed, match="max-cost-usd"):
        judge_run(run, questions_of(run, config))
    assert len(server.requests) == 2


def test_openais_own_retries_do_not_tell_what_may_be_charged(server, kit):
    """Why the judge tries again by itself: a call that broke looks like one that was refused."""
    seen = []
    for failure in ({"text": "x" * 1000, "close": True}, {"status": 500, "raw": b"{}"}):
        server.requests.clear()
        server.behave = lambda body, n, failure=failure: kit.Answer(**(failure if n == 0 else {}))
        with openai.OpenAI(base_url=server.url, api_key="x", max_retries=1) as client:
            raw = client.chat.completions.with_raw_response.create(model="m", messages=[])
        assert len(server.requests) == 2
        seen.append((raw.status_code, raw.retries_taken))
    assert seen == [(200, 1)] * 2


def test_a_dead_server_stops_the_command_early(server, make_run, judge_config, kit, quick):
    run = make_run([kit.line(f"case-{n}", "fedrx", [f"Drug {n}"]) for n in range(50)])
    config = judge_config(concurrency=1)
    server.behave = lambda body, n: kit.Answer(status=500, raw=b"{}")
    with pytest.raises(RunFailed, match="status 500"):
        judge_run(run, questions_of(run, config))
    assert len(server.requests) == 9


def test_a_dead_server_does_not_replace_an_earlier_judgement(
    server, make_run, judge_config, kit, quick
):
    run = make_run([kit.line(f"case-{n}", "fedrx", [f"Drug {n}"]) for n in range(5)])
    first = judge_run(run, questions_of(run, judge_config())).as_json()
    lines = run.lines("judge.jsonl")
    server.behave = lambda body, n: kit.Answer(status=500, raw=b"{}")
    with pytest.raises(RunFailed):
        judge_run(run, questions_of(run, judge_config(model="judge-2")))
    assert run.read_json("summary.json")["judge"] == first
    assert run.lines("judge.jsonl") == lines


def test_nobody_listening_is_one_line(make_run, judge_config, kit, quick):
    run = make_run([kit.line(f"case-{n}", "fedrx", ["Drug"]) for n in range(5)])
    config = judge_config(base_url="http://127.0.0.1:9/v1")
    with pytest.raises(RunFailed, match="no connection"):
        judge_run(run, questions_of(run, config))


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_refusal_ends_the_command_with_the_fix(server, run, judge_config, kit, status):
    server.behave = lambda body, n: kit.Answer(status=status, raw=b'{"error": "secret-echo"}')
    with pytest.raises(UserError, match="judge.model") as caught:
        judge_run(run, questions_of(run, judge_config()))
    assert "secret-echo" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_server_that_refuses_the_schema_is_asked_without(server, make_run, judge_config, kit):
    def behave(body, number):
        if "response_format" in body:
            return kit.Answer(status=400, raw=b'{"error": {"message": "response_format: no"}}')
        return kit.Answer(kit.verdicts(body))

    server.behave = behave
    run = make_run([kit.line(f"case-{n}", "fedrx", [f"Drug {n}"]) for n in range(4)])
    config = judge_config(concurrency=1)
    result = judge_run(run, questions_of(run, config)).as_json()
    assert result["appropriateness"]["fedrx"]["mean"] == 1
    assert len(server.requests) == 5
    judge_run(run, questions_of(run, config))
    assert len(server.requests) == 5
    with pytest.raises(UserError):
        judge_run(run, questions_of(run, judge_config(response_format="json-schema")))


def test_a_server_that_wants_max_completion_tokens_gets_it(server, run, judge_config, kit):
    def behave(body, number):
        if "max_tokens" in body:
            return kit.Answer(status=400, raw=b'{"error": "use max_completion_tokens instead"}')
        return kit.Answer(kit.verdicts(body))

    server.behave = behave
    assert judge_run(run, questions_of(run, judge_config())).judgements.scored == 1
    assert server.bodies[1]["max_completion_tokens"] == server.bodies[0]["max_tokens"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server, other_server, run, judge_config, kit, status):
    headers = {"location": f"{other_server.url}/chat/completions"}
    server.behave = lambda body, n: kit.Answer(status=status, headers=headers, raw=b"")
    with pytest.raises(UserError, match="redirects"):
        judge_run(run, questions_of(run, judge_config()))
    assert len(server.requests) == 1
    assert not other_server.requests


def test_a_proxy_in_the_environment_gets_nothing(
    server, other_server, run, judge_config, monkeypatch
):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{other_server.port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    judge_run(run, questions_of(run, judge_config()))
    assert len(server.requests) == 1
    assert not other_server.requests


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "gopher://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch, judge_config, kit, tmp_path, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    url = "https://judge.example/v1"
    far = SimpleNamespace(url=url, named=url, loopback=False)
    with pytest.raises(UserError, match="proxy that the environment names"):
        judge_client.JudgeClient(
            far,
            judge_config(),
            api_key="",
            meter=None,
            exchanges=Exchanges(tmp_path / "x"),
            clock=kit.StandingClock(),
        )
