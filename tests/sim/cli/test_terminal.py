"""What is said reaches a person as it is, on the right stream; how far work is, as a bar or not."""

import io

import pytest

from sim.cli.options import console_for
from sim.cli.terminal import Terminal
from sim.process.progress import Meter


@pytest.mark.parametrize("json_output", [False, True])
def test_what_is_said_is_shown_as_it_is(capsys, json_output):
    line = "[red]a[/red] :pill: " + 30 * "words "
    console_for(json_output).say(line, 1.5, style="bold")
    console_for(json_output).say("a traceback", error=True)
    told = f"{line}\n1.5\n"
    shown = "" if json_output else told
    errors = told if json_output else ""
    assert capsys.readouterr() == (shown, f"{errors}a traceback\n")


def test_a_terminal_draws_a_bar_where_a_file_gets_lines():
    drawn = {}
    for is_terminal in (True, False):
        told = io.StringIO()
        console = Terminal(file=told, force_terminal=is_terminal, width=100)
        with Meter(console, "steps", 4, done=1) as meter:
            meter.update(3, "loss 1.5")
        drawn[is_terminal] = told.getvalue()
    assert all(text in drawn[True] for text in ("steps", "3/4", "loss 1.5"))
    assert not drawn[False], "no line before its time"
