"""``fedrx resume``: go on with a run that was interrupted or killed, to the same end."""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import Config
from common.configio import differences, from_flat, read_config
from common.errors import UserError
from common.provenance import source_digest
from common.rundir import RunDirectory
from server.app import FLOWER
from sim.process.lock import exclusive
from sim.runs import federate, paper, single
from sim.runs.federate import Preparation, fingerprints, prepare


def resume(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    console: Console,
    command_line: Sequence[str],
) -> dict[str, Any]:
    """Go on with a run of any kind from its last checkpoint.

    Args:
        path: Its run directory.
        overrides: ``key=value``; a value other than the run's own is refused.
        console: Where progress and results are shown.
        command_line: Added to environment.json.

    Returns:
        The content of summary.json; a finished run's is returned as it is.

    Raises:
        UserError: if this is no run, another process is at work on it, or its configuration, data
            or backbone have changed.
    """
    run = RunDirectory.open(path)
    facts = run.read_json("environment.json")
    kinds = {single.MODE: single.go_on, federate.MODE: federate.go_on, paper.MODE: paper.go_on}
    if facts.get("mode") == FLOWER:
        return _of_flower(run, console)
    if facts.get("mode") not in kinds:
        raise UserError(f"{run.path} has no run that can be resumed", fix="start it again")
    config = unchanged_config(run, facts, overrides)
    # A paper run's table is written anew: its runs may have been judged meanwhile.
    if run.status()["state"] == "finished" and facts["mode"] != paper.MODE:
        console.print("the run is finished: nothing to do")
        return run.read_json("summary.json")
    started = time.monotonic()
    with exclusive(run):
        preparation = prepared_again(config, facts, console)
        note_resumption(run, facts, command_line, console)
        return kinds[facts["mode"]](run, config, preparation, console, started=started)


def _of_flower(run: RunDirectory, console: Console) -> dict[str, Any]:
    """Return a finished run of plain ``flwr run``; Flower alone can start an unfinished one."""
    if run.status()["state"] != "finished":
        raise UserError(f"{run.path} was made by plain `flwr run`", fix="start it again with flwr")
    console.print("the run is finished: nothing to do; `fedrx evaluate` gives its answers")
    return run.read_json("summary.json")


def unchanged_config(run: RunDirectory, facts: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Return the run's configuration, if config.toml with the overrides is still the same.

    Raises:
        UserError: naming every key that differs, with both values.
    """
    begun = from_flat(facts["config"])
    changes = differences(begun, read_config(run.path / "config.toml", overrides))
    if changes:
        raise UserError(
            "a run goes on as it began; changed: " + "; ".join(map(str, changes)),
            fix="undo the change, or start a new run with it",
        )
    return replace(begun, run=replace(begun.run, directory=str(run.path)))


def note_resumption(
    run: RunDirectory, facts: dict[str, Any], command_line: Sequence[str], console: Console
) -> None:
    """Add the resumption to environment.json, and warn if the source has changed."""
    digest = source_digest()
    if digest != facts["source_digest"]:
        console.print("FedRx's source has changed since the run began", style="yellow")
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": [Path(command_line[0]).name, *command_line[1:]] if command_line else [],
        "source_digest": digest,
    }
    run.write_json("environment.json", {**facts, "resumed": [*facts.get("resumed", []), entry]})


def prepared_again(config: Config, facts: dict[str, Any], console: Console) -> Preparation:
    """Read data and backbone again.

    Raises:
        UserError: if they are not what the run began with.
    """
    preparation = prepare(config, console)
    for name, now in fingerprints(preparation).items():
        if now != facts["inputs"][name]:
            raise UserError(
                f"the run's {name} changed since it began: {facts['inputs'][name]} -> {now}",
                fix="bring the same data and backbone back, or start a new run",
            )
    return preparation
