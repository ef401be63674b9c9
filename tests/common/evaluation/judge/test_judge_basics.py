"""Judging against a well-behaved server: figures by hand, blindness, cache, limits, repeats."""

import json
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from waiting import until

from common.errors import RunFailed, UserError
from common.evaluation.judge.judging import judge_run
from common.evaluation.judge.questions import estimate, questions_of
from sim.answers.judge import judge
from sim.process.lock import exclusive


def predictions(kit, count=3):
    return [
        kit.line(f"case-{n:04}", model, [f"{model} {n}a", f"{model} {n}b"], cluster=n)
        for n in range(count)
        for model in ("fedrx", "popularity")
    ]


def test_appropriateness_is_the_mean_over_samples_of_suitable_over_all(
    server, make_run, judge_config, kit
):
    server.behave = lambda body, n: kit.Answer(
        kit.verdicts(body, lambda d: not d.startswith("bad"))
    )
    run = make_run(
        [
            kit.line("case-1", "fedrx", ["good", "bad 1", "bad 2", "bad 3"], 1),
            kit.line("case-2", "fedrx", ["good", "GOOD ", "fine"], 2),
            kit.line("case-3", "fedrx", None, 3),
            kit.line("case-4", "fedrx", [], 4),
            kit.line("case-1", "popularity", ["bad"], 1),
        ]
    )
    result = judge_run(run, questions_of(run, judge_config())).as_json()
    fedrx = result["appropriateness"]["fedrx"]
    assert fedrx["mean"] == pytest.approx((1 / 4 + 2 / 2) / 2)
    assert (fedrx["scored"], fedrx["unscored"]) == (2, 0)
    assert (fedrx["unanswered"], fedrx["empty"]) == (1, 1)
    assert (fedrx["suitable"], fedrx["unsuitable"]) == (3, 3)
    assert 1 / 4 <= fedrx["interval"][0] <= fedrx["interval"][1] <= 1
    assert result["appropriateness"]["popularity"]["mean"] == 0
    assert result["appropriateness"]["popularity"]["interval"] is None
    assert len(server.requests) == 3
    assert (result["model"], result["served_by"]) == ("judge-1", ["m"])
    assert run.read_json("summary.json") == {"rounds": 4, "source": "synthetic", "judge": result}
    lines = run.lines("judge.jsonl")
    assert [v["suitable"] for v in lines[0]["verdicts"]] == [True, False, False, False]
    assert lines[0]["score"] == 0.25
    for file in (run.path / "judge.jsonl", run.path / "judge" / "exchanges.jsonl"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_judge_sees_neither_truth_nor_case_nor_model(server, make_run, judge_config, kit):
    record = {
        **kit.line("case-name-x", "model-name-x", ["Insulin"], cluster=987654),
        "truth": ["truth-x"],
        "text": "raw-text-x",
    }
    record["patient"] = {**record["patient"], "subject_id": "id-x"}
    run = make_run([record])
    judge_run(run, questions_of(run, judge_config()))
    headers, content = server.requests[0][0], server.requests[0][1].decode()
    for secret in ("case-name-x", "model-name-x", "987654", "truth-x", "raw-text-x", "id-x"):
        assert secret not in headers + content
    for shown in ("> 89", "160 cm", "Sepsis, unspecified organism", "Insulin"):
        assert shown in server.bodies[0]["messages"][1]["content"]
    assert server.bodies[0]["temperature"] == 0
    assert server.bodies[0]["response_format"]["json_schema"]["strict"] is True


def test_a_second_run_asks_nothing_and_gives_the_same(server, make_run, judge_config, kit):
    run = make_run(predictions(kit))
    first = judge_run(run, questions_of(run, judge_config())).as_json()
    lines = run.lines("judge.jsonl")
    second = judge_run(run, questions_of(run, judge_config())).as_json()
    assert (first.pop("invocation")["calls"], second.pop("invocation")["calls"]) == (6, 0)
    assert second == first
    assert run.lines("judge.jsonl") == lines
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "change", [{"model": "judge-2"}, {"temperature": 0.5}, {"max_output_tokens": 100}]
)
def test_the_cache_is_keyed_by_everything_that_is_sent(server, make_run, judge_config, kit, change):
    run = make_run(predictions(kit))
    judge_run(run, questions_of(run, judge_config()))
    judge_run(run, questions_of(run, judge_config(**change)))
    assert len(server.requests) == 12


def test_a_changed_list_is_asked_again(server, make_run, judge_config, kit):
    run = make_run(predictions(kit))
    judge_run(run, questions_of(run, judge_config()))
    records = run.lines("predictions.jsonl")
    records[0]["answer"][0] = "another"
    (run.path / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    judge_run(run, questions_of(run, judge_config()))
    assert len(server.requests) == 7


def test_equal_lists_for_one_patient_are_asked_once(server, make_run, judge_config, kit):
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body), delay_seconds=0.05)
    run = make_run([kit.line("case-1", model, ["Insulin"]) for model in ("fedrx", "popularity")])
    questions = questions_of(run, judge_config())
    assert estimate(run, questions).calls == 1
    result = judge_run(run, questions).as_json()
    assert len(server.requests) == 1
    assert [one["scored"] for one in result["appropriateness"].values()] == [1, 1]


def test_calls_run_side_by_side_up_to_the_limit(server, make_run, judge_config, kit):
    """After the first call nobody is answered before six ask at once; a seventh has a moment."""
    six = threading.Event()

    def behave(body, number):
        if server.in_flight == 6:
            six.set()
        if number:
            six.wait(60)
        return kit.Answer(kit.verdicts(body), delay_seconds=0.05)

    server.behave = behave
    run = make_run(predictions(kit, count=12))
    judge_run(run, questions_of(run, judge_config(concurrency=6)))
    assert server.most_in_flight == 6


def test_repeats_give_flip_rate_and_agreement(server, make_run, judge_config, kit):
    """Drugs "steady" never flip; of the "shaky" ones, every second reply differs."""

    def behave(body, number):
        return kit.Answer(kit.verdicts(body, lambda d: d.startswith("steady") or number % 2 == 0))

    server.behave = behave
    run = make_run([kit.line("case-1", "fedrx", ["steady 1", "steady 2", "steady 3", "shaky"])])
    questions = questions_of(run, judge_config(repeats=2, concurrency=1))
    result = judge_run(run, questions).as_json()
    assert result["flip_rate"] == pytest.approx(1 / 4)
    assert result["agreement"]["drugs"] == 4
    assert result["agreement"]["unanimous"] == pytest.approx(3 / 4)
    # By hand: values 7 yes, 1 no; observed 2 of 8 pairs, expected 2 * 7 * 1 / 7 of 8.
    assert result["agreement"]["alpha"] == pytest.approx(0.0)
    assert result["appropriateness"]["fedrx"]["mean"] == pytest.approx((1 + 3 / 4) / 2)
    assert len(server.requests) == 2


def test_two_judges_agree_or_not_but_do_not_flip(server, make_run, judge_config, kit):
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body, lambda _: body["model"] == "a"))
    run = make_run(predictions(kit))
    result = judge_run(run, questions_of(run, judge_config(model="a, b"))).as_json()
    assert result["flip_rate"] is None
    assert result["agreement"]["unanimous"] == 0
    assert result["appropriateness"]["fedrx"]["mean"] == 0.5


def test_a_dry_run_asks_nothing_and_writes_nothing(server, make_run, judge_config, kit):
    run = make_run(predictions(kit))
    config = judge_config(input_usd_per_million=2.0, output_usd_per_million=8.0)
    before = estimate(run, questions_of(run, config)).as_json()
    assert not server.requests
    assert not (run.path / "judge").exists()
    assert (before["lists"], before["calls"], before["cached"]) == (6, 6, 0)
    by_hand = (before["input_tokens"] * 2 + before["output_tokens"] * 8) / 1e6
    assert before["cost_usd"] == pytest.approx(by_hand)
    assert before["most_usd"] > before["cost_usd"] > 0
    judge_run(run, questions_of(run, config))
    after = estimate(run, questions_of(run, config)).as_json()
    assert (after["calls"], after["cached"], after["cost_usd"]) == (0, 6, 0)


def test_usage_and_cost_are_the_servers_counts_times_the_price(server, make_run, judge_config, kit):
    run = make_run(predictions(kit))
    config = judge_config(input_usd_per_million=10.0, output_usd_per_million=40.0)
    result = judge_run(run, questions_of(run, config)).as_json()
    assert result["usage"]["calls"] == 6
    assert (result["usage"]["input_tokens"], result["usage"]["output_tokens"]) == (600, 120)
    assert result["cost_usd"] == pytest.approx(600 * 10e-6 + 120 * 40e-6)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_cost_limit_is_never_passed_and_can_be_raised(
    server, make_run, judge_config, kit, concurrency
):
    """The server bills 1 USD per call: 1000 reply tokens at 1000 USD per million."""
    usage = {"prompt_tokens": 0, "completion_tokens": 1000}
    server.behave = lambda body, n: kit.Answer(kit.verdicts(body), usage=usage)
    run = make_run(predictions(kit, count=10))
    prices = {"output_usd_per_million": 1000.0, "max_output_tokens": 2000}
    config = judge_config(max_cost_usd=7.5, concurrency=concurrency, **prices)
    with pytest.raises(RunFailed, match="max-cost-usd"):
        judge_run(run, questions_of(run, config))
    billed = float(len(server.requests))
    # A call may take 2 USD: the sixth fits below 7.5, the seventh might not.
    assert billed == 6
    partial = run.read_json("summary.json")["judge"]
    assert partial["cost_usd"] == pytest.approx(billed)
    assert partial["complete"] is False
    assert partial["judgements"]["not_asked"] == 14
    judge_run(run, questions_of(run, judge_config(max_cost_usd=0.0, **prices)))
    assert len(server.requests) == 20
    assert run.read_json("summary.json")["judge"]["complete"] is True


def test_a_limit_without_prices_is_refused(make_run, judge_config, kit):
    run = make_run(predictions(kit))
    with pytest.raises(UserError, match="no price"):
        questions_of(run, judge_config(max_cost_usd=1.0))


@pytest.mark.process
def test_kill_9_loses_at_most_what_was_in_flight(server, make_run, judge_config, kit, tmp_path):
    killed = threading.Event()

    def behave(body, number):
        """Answer eight, and the others when nobody waits any more."""
        if number >= 8:
            killed.wait(60)
        return kit.Answer(kit.verdicts(body))

    server.behave = behave
    run = make_run(predictions(kit, count=10))
    script = textwrap.dedent(f"""
        from pathlib import Path
        from common.config import JudgeConfig
        from common.evaluation.judge.judging import judge_run
        from common.evaluation.judge.questions import questions_of
        from common.rundir import RunDirectory
        run = RunDirectory.open(Path({str(run.path)!r}))
        config = JudgeConfig(base_url={server.url!r}, model="judge-1", concurrency=2)
        judge_run(run, questions_of(run, config))
    """)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path.cwd())
    until(lambda: len(server.requests) > 8, "the ninth request")
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed.set()
    with (run.path / "judge" / "exchanges.jsonl").open("a") as file:
        file.write('{"key": "torn')
    before = len(server.requests)
    assert before in (9, 10)
    result = judge_run(run, questions_of(run, judge_config(concurrency=2))).as_json()
    assert result["appropriateness"]["fedrx"]["scored"] == 10
    assert 20 <= len(server.requests) <= 22
    judge_run(run, questions_of(run, judge_config(concurrency=2)))
    assert len(server.requests) <= 22


def test_two_judges_at_once_on_one_run_are_refused(make_run, judge_config, kit):
    run = make_run(predictions(kit))
    with exclusive(run), pytest.raises(UserError, match="another process is at work"):
        judge(run, questions_of(run, judge_config()))


@pytest.mark.parametrize("model", ["", " , ", "a,a"])
def test_a_judge_must_be_named(make_run, judge_config, kit, model):
    with pytest.raises(UserError, match="judge.model"):
        questions_of(make_run(predictions(kit)), judge_config(model=model))


def test_only_the_named_models_are_judged(server, make_run, judge_config, kit):
    run = make_run(predictions(kit))
    result = judge_run(
        run, questions_of(run, judge_config(), predicted_by=["popularity"])
    ).as_json()
    assert list(result["appropriateness"]) == ["popularity"]
    with pytest.raises(UserError, match="no predictions by nobody"):
        questions_of(run, judge_config(), predicted_by=["nobody"])
