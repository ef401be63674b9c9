"""Which hospitals a round's validation loss needs, and what it is the mean of."""

import io

import pytest
from tampering import silent

from common.errors import RunFailed
from sim.cli.terminal import Terminal
from sim.report.comparison import write_comparison
from sim.report.run_report import run_blocks
from sim.report.terminal import summary_parts
from sim.runs.sweep import FIGURES

MORE = {"data__synthetic_patients": 90, "federation__rounds": 1}
"""All three hospitals have validation samples."""


def test_evaluation_below_quorum_fails(tiny_config, in_process):
    config = tiny_config(**MORE, federation__timeout_seconds=0.3)
    with pytest.raises(RunFailed, match=r"round 0: 1 of 3 hospitals answered, the quorum is 2"):
        in_process(config, tamper=dict.fromkeys((0, 1), silent("evaluate")))
    done = in_process(config, tamper={0: silent("evaluate")})
    assert len(done.summary["validation_loss"]) == 2


def test_validation_loss_is_the_mean_over_all_hospitals_tokens(tiny_config, in_process):
    """By hand, from the replies on the wire."""
    done = in_process(tiny_config(**MORE))
    messages = [message for _, message in done.grid.wire("up")]
    told = [m.content["metrics"] for m in messages if m.metadata.message_type == "evaluate"]
    for server_round, loss in enumerate(done.summary["validation_loss"]):
        parts = [(m["loss"], m["weight"]) for m in told if m["round"] == server_round]
        assert len({weight for _, weight in parts}) > 1
        total = sum(weight for _, weight in parts)
        assert loss == pytest.approx(sum(a * b for a, b in parts) / total, rel=1e-12)


@pytest.mark.parametrize("left", [0, 1])
def test_round_that_nobody_can_evaluate_says_so(left, tiny_config, in_process):
    """All but ``left`` hospitals leave after the last round's train messages."""
    gone = False

    def leave(grid, message):
        nonlocal gone
        last = message.metadata.dst_node_id == grid.node(2)
        gone = gone or (last and message.metadata.message_type == "train")

    done = in_process(
        tiny_config(**MORE),
        on_message=leave,
        online=lambda index, seen: not gone or index < left,
    )
    untrained, trained = done.summary["validation_loss"]
    assert untrained > 0
    assert trained is None
    (event,) = done.run.metrics("not-evaluated")
    assert event.round == 1
    assert event.value.startswith(f"{left} of 3 hospitals with validation samples are connected")
    assert done.run.status().state == "finished"


def test_round_without_a_loss_is_shown_as_a_dash(tiny_config, in_process, tmp_path):
    """By whoever reads the last loss: the terminal, the report, the comparison, the sweep."""
    done = in_process(tiny_config(**MORE))
    summary = {**done.summary, "validation_loss": [3.0, None], "source": "credentialed"}
    done.run.write_json("summary.json", summary)
    output = Terminal(file=io.StringIO(), width=120)
    output.say(*summary_parts(done.run, done.run.summary()))
    assert "validation loss 3.0000 -> –" in output.file.getvalue()
    assert run_blocks(done.run)
    write_comparison([done.run], tmp_path / "compared")
    assert FIGURES["validation loss"](done.run.summary()) is None
