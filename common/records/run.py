"""What a run directory says of the run: what kind it is, what it reads."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from common.records import Record

SCHEMA = 1
"""Version of all files of a run directory, in its run.json."""
Mode = Literal["federation", "single", "paper", "sweep", "audit", "flower"]
"""How a run is made; ``flower`` by plain ``flwr run``, which alone can start it again."""


class Inputs(Record):
    """What a run reads, by sha256: a resumed one must read the same."""

    samples: str = ""
    backbone: str = ""
    a: str = ""


class Layout(Record):
    """What a federation's server must know of backbone and adapter, as its launcher found them."""

    backbone: str
    """Its fingerprint, as hospitals load it and ask it."""
    shapes: dict[str, tuple[int, ...]]
    """Of all that the server holds, by wire key."""
    trainable_parameters: int


class RunRecord(Record):
    """run.json: what kind of run a directory holds, and what it takes to go on with it."""

    absent_when_none = ("layout",)
    schema_version: int = SCHEMA
    mode: Mode
    resumable: bool
    """Whether ``fedrx resume`` goes on with it."""
    config: dict[str, bool | int | float | str] = {}
    """By dotted key, as the run began."""
    inputs: Inputs = Inputs()
    scale: str = ""
    """Of a paper run."""
    ranks: tuple[int, ...] = ()
    """Of a paper run: each has a run of its own inside."""
    best: bool = False
    """Of a paper run: whether the best settings found here have a run inside too."""
    cells: tuple[str, ...] = ()
    """Of a sweep: the folders of its runs."""
    layout: Layout | None = None
    """Of a federation."""

    @classmethod
    def of_environment(cls, facts: Mapping[str, Any]) -> Self:
        """Return the record of a run made before there was run.json, from its environment.json."""
        mode = facts.get("mode", "audit")  # the one kind that did not say what it was
        known = {key: facts[key] for key in ("config", "inputs", "scale", "ranks") if key in facts}
        resumable = mode not in ("audit", "flower")
        return cls.read({"mode": mode, "resumable": resumable, **known}, what="environment.json")
