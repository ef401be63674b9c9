"""``fedrx judge`` as it is typed."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from common.errors import RunFailed, UserError
from sim.cli.main import app


def fedrx(*arguments):
    """Return the JSON that the command prints last, or raise what it raises."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def demo(make_run, kit):
    lines = [kit.line(f"case-{n}", m, [f"{m} {n}"], n) for n in (1, 2) for m in ("fedrx", "other")]
    return make_run(lines, source="demo")


def settings(server):
    return ["--set", f"judge.base-url={server.url}", "--set", "judge.model=m"]


def test_dry_run_then_judge_then_nothing_left(server, demo, kit):
    figures = fedrx("judge", demo.path, *settings(server), "--dry-run")
    assert (figures["calls"], figures["source"]) == (4, "demo")
    assert not server.requests
    result = fedrx("judge", demo.path, *settings(server), "--list-by", "fedrx")
    assert result["appropriateness"]["fedrx"]["mean"] == 1
    assert len(server.requests) == 2
    assert fedrx("judge", demo.path, *settings(server), "--dry-run")["calls"] == 2
    assert demo.read_json("summary.json")["judge"] == result


def test_the_key_comes_from_the_named_variable(server, demo, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame-1")
    fedrx("judge", demo.path, *settings(server), "--set", "judge.api-key-env=MY_KEY")
    assert "Bearer sesame-1" in server.requests[0][0]
    assert "sesame-1" not in "".join(f.read_text() for f in demo.path.rglob("*.json*"))


def test_another_machine_is_not_called_without_the_key_that_is_named(demo, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    # Nobody answers there, and it costs no wait to learn so.
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    abroad = ["--set", "judge.base-url=https://judge.invalid/v1", "--set", "judge.model=m"]
    abroad += ["--set", "judge.attempts=1"]
    with pytest.raises(UserError) as caught:
        fedrx("judge", demo.path, *abroad)
    assert caught.value.exit_status == 2
    assert "OPENAI_API_KEY, the API key for judge.invalid, is not set" in str(caught.value)
    assert "export OPENAI_API_KEY" in str(caught.value)
    assert fedrx("judge", demo.path, *abroad, "--dry-run")["calls"] == 4
    # A server may need no key; whoever says so is let through, and is told where to look.
    for way in (["--set", "judge.api-key-env="], ["--set", "judge.api-key-env=MY_KEY"]):
        monkeypatch.setenv("MY_KEY", "sesame-1")
        with pytest.raises(RunFailed) as failed:
            fedrx("judge", demo.path, *abroad, *way)
        assert "no connection" in str(failed.value)
        assert "check judge.base-url and the network or proxy" in str(failed.value)
        assert "start it" not in str(failed.value)


def test_a_judge_on_this_machine_that_does_not_answer_is_to_be_started(demo):
    here = ["--set", "judge.base-url=http://127.0.0.1:9/v1", "--set", "judge.model=m"]
    with pytest.raises(RunFailed, match="; start it, then run the same command again"):
        fedrx("judge", demo.path, *here, "--set", "judge.attempts=1")


def test_judgements_that_are_all_there_need_no_key(server, demo, monkeypatch):
    monkeypatch.setattr("common.evaluation.judge.gate._is_loopback", lambda address: False)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-1")
    fedrx("judge", demo.path, *settings(server))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert fedrx("judge", demo.path, *settings(server))["invocation"]["calls"] == 0
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        fedrx("judge", demo.path, *settings(server), "--set", "judge.repeats=2")


def test_a_cost_limit_from_the_command_line(server, demo):
    prices = ["--set", "judge.output-usd-per-million=1000", "--set", "judge.max-output-tokens=1000"]
    with pytest.raises(RunFailed, match="max-cost-usd=0.5") as caught:
        fedrx("judge", demo.path, *settings(server), *prices, "--max-cost-usd", "0.5")
    assert caught.value.exit_status == 1
    assert not server.requests


def test_credentialed_data_stays_here_unless_both_are_stated(server, make_run, kit):
    run = make_run([kit.line("case-1", "fedrx", ["Insulin"])], source=None, name="secret")
    abroad = ["--set", "judge.base-url=https://judge.example/v1", "--set", "judge.model=m"]
    with pytest.raises(UserError, match="not loopback") as caught:
        fedrx("judge", run.path, *abroad)
    assert caught.value.exit_status == 2
    for half in (["--agreement-host", "judge.example"], ["--agreement", "A contract of 2031"]):
        with pytest.raises(UserError, match="go together"):
            fedrx("judge", run.path, *abroad, *half, "--dry-run")
    both = ["--agreement-host", "judge.example", "--agreement", "A contract of 2031"]
    assert fedrx("judge", run.path, *abroad, *both, "--dry-run")["source"] == "credentialed"
    with pytest.raises(UserError, match="names host"):
        fedrx("judge", run.path, *abroad, "--agreement-host", "x.example", *both[2:], "--dry-run")
    assert fedrx("judge", run.path, *settings(server))["judgements"]["scored"] == 1


def test_other_sections_cannot_be_set(demo):
    with pytest.raises(UserError, match="train.seed"):
        fedrx("judge", demo.path, "--set", "train.seed=3")


def test_a_dry_run_needs_no_model(server, demo):
    figures = fedrx("judge", demo.path, "--dry-run")
    assert (figures["calls"], figures["cached"]) == (4, 0)
    with pytest.raises(UserError, match="judge.model"):
        fedrx("judge", demo.path)


def test_nothing_scored_is_a_failure_with_its_reasons(server, demo, kit):
    server.behave = lambda body, n: kit.Answer("no")
    result = CliRunner().invoke(app, ["judge", str(demo.path), *settings(server)])
    assert isinstance(result.exception, RunFailed)
    assert result.exception.exit_status == 1
    assert "nothing was scored: 4 x not-json" in str(result.exception)
    assert "unscored by m: 4 x not-json" in result.output
    assert demo.read_json("summary.json")["judge"]["judgements"]["unscored"] == 4
    # One verdict is enough.
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body))
    fedrx("judge", demo.path, *settings(server)[:3], "judge.model=other")


def test_the_terminal_tells_reasons_judges_and_what_this_time_took(server, demo, kit):
    server.behave = lambda body, n: (
        kit.Answer("nonsense")
        if kit.listed(body) == ["fedrx 1"]
        else kit.Answer(kit.verdicts(body))
    )
    arguments = ["judge", str(demo.path), "--set", f"judge.base-url={server.url}"]
    for name in ("[red]one", "two"):
        result = CliRunner().invoke(app, [*arguments, "--set", f"judge.model={name}"])
        assert result.exit_code == 0
    for text in ("[red]one", "two", "unscored by [red]one: 1 x not-json", "this time: 5 calls"):
        assert text in result.output
    assert "all together: 10 calls" in result.output


def test_a_failed_judging_goes_on_with_the_command_as_it_was_typed(demo):
    asked = ["--set", "judge.base-url=http://127.0.0.1:9/v1", "--set", "judge.model=a b"]
    asked += ["--set", "judge.attempts=1", "--list-by", "fedrx", "--list-by", "other"]
    result = CliRunner().invoke(app, ["judge", str(demo.path), *asked])
    command = shlex.split(result.exception.command)
    assert command == ["fedrx", "judge", *asked, str(demo.path)]


def test_an_empty_run_of_lists_is_a_failure(server, make_run, kit):
    run = make_run([kit.line("case-1", "fedrx", None)])
    with pytest.raises(RunFailed, match="there is no list to judge"):
        fedrx("judge", run.path, *settings(server))
