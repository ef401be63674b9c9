"""Servers that take less than the whole interface, and replies in other clothes."""

import json

import pytest

from common.errors import RunFailed, UserError
from common.evaluation.judge import client as judge_client
from common.evaluation.judge.judging import judge_run
from common.evaluation.judge.questions import estimate, questions_of


@pytest.fixture
def run(make_run, kit):
    return make_run([kit.line(f"case-{n}", "fedrx", [f"Drug {n}"], n) for n in range(12)])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(judge_client, "FIRST_WAIT_SECONDS", 0.01)


def judged(run, config, **options):
    return judge_run(run, questions_of(run, config, **options)).as_json()


def complaint(kit, text, status=400):
    return kit.Answer(status=status, raw=json.dumps({"error": {"message": text}}).encode())


REFUSED = {
    "schema": ("response_format", "response_format is not supported", 400),
    "schema, 500": ("response_format", "json_schema: engine failed", 500),
    "schema, 422": ("response_format", "guided decoding is off", 422),
    "limit": ("max_tokens", "Use 'max_completion_tokens' instead.", 400),
    "temperature": ("temperature", "Unsupported value: 'temperature' does not support 0", 400),
    "system": ("system", "System role not supported", 400),
    "system, jinja": ("system", "Conversation roles must alternate user/assistant/...", 500),
}


def takes_no(what, body):
    return body["messages"][0]["role"] == "system" if what == "system" else what in body


@pytest.mark.parametrize("name", REFUSED)
def test_a_dialect_is_found_once_and_kept(server, run, judge_config, kit, name):
    """One refused call over all lists, also with eight in flight, and none in the next run."""
    what, text, status = REFUSED[name]
    server.behave = lambda body, n: (
        complaint(kit, text, status)
        if takes_no(what, body)
        else kit.Answer(kit.verdicts(body), delay_seconds=0.02)
    )
    result = judged(run, judge_config(concurrency=8, attempts=1))
    assert result["judgements"]["scored"] == 12
    assert sum(takes_no(what, body) for body in server.bodies) == 1
    assert len(server.requests) == 13
    assert estimate(run, questions_of(run, judge_config())).calls == 0
    lines = run.lines("predictions.jsonl")
    run.append("predictions.jsonl", {**lines[0], "case": "case-new", "answer": ["Another"]})
    assert judged(run, judge_config())["judgements"]["scored"] == 13
    assert sum(takes_no(what, body) for body in server.bodies) == 1
    assert len(server.requests) == 14


def test_everything_may_be_refused_at_once(server, run, judge_config, kit):
    def behave(body, number):
        for what, text, status in REFUSED.values():
            if takes_no(what, body):
                return complaint(kit, text, status)
        return kit.Answer(kit.verdicts(body))

    server.behave = behave
    assert judged(run, judge_config())["judgements"]["scored"] == 12
    last = server.bodies[-1]
    assert set(last) == {"model", "messages", "max_completion_tokens"}
    assert [message["role"] for message in last["messages"]] == ["user"]
    # The rubric is still there, in front of the list.
    assert last["messages"][0]["content"].startswith(server.bodies[0]["messages"][0]["content"])
    assert len(server.requests) == 12 + 4


def test_a_500_at_the_schema_without_a_word_is_found_too(server, run, judge_config, kit, quick):
    server.behave = lambda body, n: (
        kit.Answer(status=500, raw=b"Internal Server Error")
        if "response_format" in body
        else kit.Answer(kit.verdicts(body))
    )
    result = judged(run, judge_config(attempts=3))
    assert result["judgements"]["scored"] == 12
    assert len(server.requests) == 2 + 12


def test_a_500_that_passes_does_not_cost_the_schema(server, run, judge_config, kit, quick):
    server.behave = lambda body, n: (
        kit.Answer(status=500, raw=b"busy") if n == 0 else kit.Answer(kit.verdicts(body))
    )
    judged(run, judge_config(attempts=3))
    assert all("response_format" in body for body in server.bodies)


def test_each_judge_has_its_own_dialect(server, run, judge_config, kit):
    server.behave = lambda body, n: (
        complaint(kit, "temperature")
        if body["model"] == "a" and "temperature" in body
        else kit.Answer(kit.verdicts(body))
    )
    assert judged(run, judge_config(model="a,b"))["judgements"]["scored"] == 24
    assert all("temperature" in body for body in server.bodies if body["model"] == "b")
    assert len(server.requests) == 25


TOO_LONG = (
    "This model's maximum context length is 4096 tokens; 'max_tokens' or "
    "'max_completion_tokens' is too large for your request"
)


@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_list_that_is_refused_is_unscored_and_the_others_go_on(
    server, run, judge_config, kit, place, status
):
    """Nor does its complaint change how the others are asked, or is it asked again later."""
    server.behave = lambda body, n: (
        complaint(kit, TOO_LONG, status)
        if kit.listed(body) == [f"Drug {place}"]
        else kit.Answer(kit.verdicts(body))
    )
    config = judge_config(concurrency=1)
    result = judged(run, config)
    assert result["judgements"]["scored"] == 11
    assert result["judgements"]["problems"] == {f"refused: status {status}": 1}
    assert result["appropriateness"]["fedrx"]["unscored"] == 1
    others = [body for body in server.bodies if kit.listed(body) != [f"Drug {place}"]]
    assert len(others) == 11
    assert all("max_tokens" in body for body in others)
    before = len(server.requests)
    assert estimate(run, questions_of(run, config)).calls == 0
    again = judged(run, config)
    assert len(server.requests) == before
    assert again["judgements"] == result["judgements"]
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body))
    assert judged(run, config, retry_refused=True)["judgements"]["scored"] == 12
    assert len(server.requests) == before + 1


def test_equal_lists_that_are_refused_are_asked_once(server, make_run, judge_config, kit):
    run = make_run([kit.line("case-1", model, ["Insulin"]) for model in ("fedrx", "other")])
    server.behave = lambda body, n: complaint(kit, "too long")
    result = judged(run, judge_config())
    assert result["judgements"]["problems"] == {"refused: status 400": 2}
    assert len(server.requests) == 1


def test_a_server_that_refuses_every_list_ends_the_command(server, run, judge_config, kit):
    server.behave = lambda body, n: complaint(kit, "secret-echo")
    with pytest.raises(UserError, match="status 400 for each of 10 lists") as caught:
        judged(run, judge_config(concurrency=1))
    assert "secret-echo" not in str(caught.value)
    assert len(server.requests) == 10
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body))
    assert judged(run, judge_config())["judgements"]["scored"] == 12


CLOTHES = {
    "thought closed only": lambda text: {
        "content": f'Let me see {{"drugs": 3}}.\n</think>\n{text}'
    },
    "thought": lambda text: {"content": f"<think>hm {{</think>\n\n{text}"},
    "reasoning beside": lambda text: {"content": text, "reasoning_content": '{"drugs": []}'},
    "reasoning alone": lambda text: {"content": None, "reasoning_content": f"So: {text}"},
    "reasoning, newer": lambda text: {"content": "", "reasoning": f"hm</think>{text}"},
    "parts": lambda text: {
        "content": [
            {"type": "reasoning", "reasoning": "hm"},
            {"type": "text", "text": text[:9]},
            {"type": "text", "text": text[9:]},
        ]
    },
    "byte order mark": lambda text: {"content": f"\ufeff{text}"},
    "prose before": lambda text: {"content": f"Here is the {{JSON}} you asked for:\n\n{text}"},
    "prose around": lambda text: {"content": f"Sure!\n```json\n{text}\n```\nAnything else?"},
}


@pytest.mark.parametrize("name", CLOTHES)
def test_a_right_answer_counts_whatever_it_wears(server, run, judge_config, kit, name):
    server.behave = lambda body, n: kit.Answer(message=CLOTHES[name](kit.verdicts(body)))
    result = judged(run, judge_config())
    assert result["judgements"]["scored"] == 12
    assert len(server.requests) == 12


def test_a_body_with_a_byte_order_mark_is_read(server, run, judge_config, kit):
    server.behave = lambda body, n: kit.Answer(
        raw=b"\xef\xbb\xbf"
        + json.dumps({"choices": [{"message": {"content": kit.verdicts(body)}}]}).encode()
    )
    assert judged(run, judge_config())["judgements"]["scored"] == 12


def test_a_thought_that_was_cut_is_no_answer(server, run, judge_config, kit):
    """What stands in it is a draft."""
    server.behave = lambda body, n: kit.Answer(
        message={"content": None, "reasoning_content": kit.verdicts(body)}, finish="length"
    )
    assert judged(run, judge_config())["judgements"]["problems"] == {"cut": 12}


def test_a_reason_is_kept_as_it_is(server, make_run, judge_config, kit):
    reason = "  [bold]because[/] </think> of {braces}, \u00fc \U0001f600\n" + "long " * 300
    entry = {"drug": "Insulin", "suitable": True, "reason": reason}
    server.behave = lambda body, n: kit.Answer(json.dumps({"drugs": [entry]}))
    run = make_run([kit.line("case-1", "fedrx", ["Insulin"])])
    result = judged(run, judge_config())
    assert run.lines("judge.jsonl")[0]["verdicts"][0]["reason"] == reason
    assert "escaped_texts" not in result["judgements"]


@pytest.mark.parametrize("where", ["reply", "reason", "model"])
def test_text_that_utf8_cannot_hold_is_kept_escaped_and_counted(
    server, make_run, judge_config, kit, where
):
    reason = "half \ud83d of it"
    text = json.dumps({"drugs": [{"drug": "Insulin", "suitable": True, "reason": reason}]})
    if where == "reply":
        text = text.replace("\\ud83d", "\ud83d")
    document = {"choices": [{"message": {"content": text}}], "model": "m\ud800"}
    server.behave = lambda body, n: kit.Answer(raw=json.dumps(document).encode())
    run = make_run([kit.line("case-1", "fedrx", ["Insulin"])])
    result = judged(run, judge_config())
    assert run.lines("judge.jsonl")[0]["verdicts"][0]["reason"] == r"half \ud83d of it"
    assert result["judgements"]["escaped_texts"] == 1
    assert result["served_by"] == [r"m\ud800"]
    again = judged(run, judge_config())
    assert again["judgements"] == result["judgements"]
    assert len(server.requests) == 1


def test_a_reply_that_utf8_cannot_hold_is_mended_too(server, make_run, judge_config, kit):
    server.behave = lambda body, n: kit.Answer("half \ud83d" if n == 0 else kit.verdicts(body))
    run = make_run([kit.line("case-1", "fedrx", ["Insulin"])])
    assert judged(run, judge_config())["judgements"]["repaired"] == 1
    assert server.bodies[1]["messages"][2]["content"] == r"half \ud83d"


def test_a_list_that_utf8_cannot_hold_is_asked_about(server, make_run, judge_config, kit):
    run = make_run([kit.line("case-1", "fedrx", ["Insulin \ud83d"])])
    assert judged(run, judge_config())["judgements"]["scored"] == 1
    assert kit.listed(server.bodies[0]) == [r"Insulin \ud83d"]


# Judges side by side.


def test_a_second_judge_stands_beside_the_first(server, run, judge_config, kit):
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body, lambda _: body["model"] == "a"))
    first = judged(run, judge_config(model="a"))
    lines = run.lines("judge.jsonl")
    second = judged(run, judge_config(model="b"))
    assert run.lines("judge.jsonl")[:12] == lines
    assert {line["judge"] for line in run.lines("judge.jsonl")[12:]} == {"b"}
    assert second["judges"]["a"] == first["judges"]["a"]
    means = {n: one["appropriateness"]["fedrx"]["mean"] for n, one in second["judges"].items()}
    assert means == {"a": 1, "b": 0}
    assert second["model"] == "a, b"
    # As if both had been asked at once.
    assert second["agreement"] == {"alpha": pytest.approx(-11 / 12), "unanimous": 0, "drugs": 12}
    assert (second["invocation"]["calls"], second["usage"]["calls"]) == (12, 24)
    together = judged(run, judge_config(model="a,b"))
    assert together["judges"] == second["judges"]
    assert len(server.requests) == 24


def test_one_name_on_two_servers_is_two_judges(server, other_server, run, judge_config, kit):
    other_server.behave = lambda body, n: kit.Answer(kit.verdicts(body, lambda _: False))
    judged(run, judge_config())
    result = judged(run, judge_config(base_url=other_server.url))
    means = [one["appropriateness"]["fedrx"]["mean"] for one in result["judges"].values()]
    assert means == [1, 0]
    assert [name.startswith("judge-1 at http") for name in result["judges"]] == [True, True]


def test_a_judge_has_no_row_of_a_model_that_it_was_never_asked_about(
    server, other_server, make_run, judge_config, kit
):
    lists = {"fedrx": ["A"], "popularity": ["A"], "untrained": None}
    run = make_run([kit.line("case-1", model, drugs) for model, drugs in lists.items()])
    judged(run, judge_config(), predicted_by=["fedrx"])
    result = judged(run, judge_config(base_url=other_server.url))
    rows = [list(one["appropriateness"]) for one in result["judges"].values()]
    # One that gave no list at all is still told of the judge that was asked about everybody.
    assert rows == [["fedrx"], list(lists)]
    last = list(result["judges"].values())[1]
    assert last["appropriateness"]["untrained"]["unanswered"] == 1


def test_a_judge_asked_again_replaces_itself_on_the_same_lists_only(
    server, make_run, judge_config, kit
):
    run = make_run([kit.line("case-1", m, [m]) for m in ("fedrx", "popularity")])
    judged(run, judge_config())
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body, lambda _: False))
    result = judged(run, judge_config(temperature=0.5), predicted_by=["popularity"])
    means = {model: one["mean"] for model, one in result["appropriateness"].items()}
    assert means == {"fedrx": 1, "popularity": 0}
    assert len(run.lines("judge.jsonl")) == 2


def test_words_on_answers_that_are_gone_do_not_stay(server, run, judge_config, kit):
    judged(run, judge_config(model="a"))
    records = run.lines("predictions.jsonl")
    records[0]["answer"] = ["Another"]
    (run.path / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    result = judged(run, judge_config(model="b"))
    assert result["judges"]["a"]["judgements"]["scored"] == 11
    run.write_json("summary.json", {})
    assert list(judged(run, judge_config(model="b"))["judges"]) == ["b"]


def test_a_stopped_second_judge_leaves_the_first(server, run, judge_config, kit, quick):
    first = judged(run, judge_config(model="a"))
    server.behave = lambda body, n: kit.Answer(status=503, raw=b"{}")
    with pytest.raises(RunFailed):
        judged(run, judge_config(model="b"))
    assert run.read_json("summary.json")["judge"] == first


def test_cost_is_of_the_invocation_and_of_all(server, run, judge_config, kit):
    prices = {"input_usd_per_million": 10.0, "output_usd_per_million": 40.0}
    judged(run, judge_config(model="a", **prices))
    result = judged(run, judge_config(model="b", **prices))
    one = 12 * (100 * 10e-6 + 20 * 40e-6)
    assert result["invocation"]["cost_usd"] == pytest.approx(one)
    assert result["cost_usd"] == pytest.approx(2 * one)
