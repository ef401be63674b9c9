"""A real OpenAI-compatible server process: `transformers serve` with the embedded backbone.

The small model rarely keeps to the schema, and the server ignores ``response_format``: what is
tested is that every reply of a real one ends as a checked verdict or as unscored, with its usage.
"""

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

from common.config import JudgeConfig
from common.errors import UserError
from common.evaluation.judge.judging import judge_run
from common.evaluation.judge.questions import questions_of
from sim.flower.superlink import free_port


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    from common.model.backbone.load import resolve_backbone

    try:
        folder = str(resolve_backbone("embedded").folder)
    except UserError as error:
        pytest.skip(f"no embedded backbone: {error}")
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = Path(sys.executable).with_name("transformers")
    with log.open("w") as out:
        process = subprocess.Popen(
            [command, "serve", folder, "--device=cpu", "--host=127.0.0.1", f"--port={port}"],
            stdout=out,
            stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:

        def is_up() -> bool:
            if process.poll() is not None:
                pytest.skip(f"transformers serve does not start here: {log.read_text()[-300:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                return True
            return False

        until(is_up, "transformers serve answers", 300, pause=0.25)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.process
@pytest.mark.embedded
def test_a_real_server_is_asked_and_its_replies_are_checked(transformers_serve, make_run, kit):
    url, model = transformers_serve
    run = make_run([kit.line("case-1", "fedrx", ["Insulin", "Heparin"])], source="credentialed")
    config = JudgeConfig(base_url=url, model=model, max_output_tokens=64, concurrency=1)
    result = judge_run(run, questions_of(run, config)).as_json()
    fedrx = result["appropriateness"]["fedrx"]
    assert fedrx["scored"] + fedrx["unscored"] == 1
    assert not any(name.startswith("server") for name in result["judgements"]["problems"])
    usage = result["usage"]
    assert 1 <= usage["calls"] <= 2
    assert usage["calls_without_usage"] == 0
    # The rubric alone is well above 150 tokens, and no reply may pass its limit.
    assert usage["input_tokens"] > 150 * usage["calls"]
    assert 0 < usage["output_tokens"] <= 64 * usage["calls"]
    for line in run.lines("judge.jsonl"):
        assert line["scored"] == (line["verdicts"] is not None)
        assert line["exchanges"]
    again = judge_run(run, questions_of(run, config)).as_json()
    assert again.pop("invocation")["calls"] == 0
    assert result.pop("invocation")["calls"] == usage["calls"]
    assert again == result
