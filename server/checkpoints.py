"""The federation between two rounds: how B travels, what a checkpoint keeps, what may go on."""

from collections.abc import Mapping
from dataclasses import dataclass

from common.config import Config
from common.configio import differences, flatten, from_flat
from common.errors import RunFailed
from common.provenance import tensors_sha256
from common.records.run import SavedFacts
from common.rundir import Checkpoint, RunDirectory
from common.wire.codecs import compress, decode
from common.wire.contract import Fingerprints, Shapes, Tensors
from server.roster import Roster
from server.strategy import Aggregator
from server.timeouts import Pace

STRATEGY, CARRIED = "strategy.", "carried."
COUNTED = "federation.hospitals"
"""The hospitals say how many they are; the handshake compares that."""


class ChangedRun(RunFailed):
    """The run directory is another run's: it is left as it is."""


def inputs_of(ours: Fingerprints) -> dict[str, str]:
    """Return what a resumed run must share with its checkpoint; the source may change."""
    return {"a": ours.a, "backbone": ours.backbone}


def check_unchanged(facts: SavedFacts, config: Config, ours: Fingerprints) -> None:
    """Compare a checkpoint's configuration and fingerprints with this process's.

    Raises:
        ChangedRun: naming everything that differs, with both values.
    """
    changes = [
        str(change)
        for change in differences(from_flat(facts.config), config)
        if not change.key.startswith(COUNTED)
    ]
    now = inputs_of(ours)
    changes += [
        f"{name} fingerprint: {value} -> {now[name]}"
        for name, value in facts.inputs.items()
        if value != now[name]
    ]
    if changes:
        raise ChangedRun(
            "a run goes on as it began; changed: "
            + "; ".join(changes)
            + "; fix: undo the change, or name another run.directory"
        )


@dataclass(frozen=True, kw_only=True)
class Round:
    """A finished round: the global B after it, and how the hospitals get it."""

    number: int
    """From 1; 0 is before the first."""
    b: Tensors
    owed: Tensors
    """With a lossy codec: what the messages before this one owe the hospitals of B."""
    wire: Tensors
    """B and what was owed, in the codec's layout."""
    received: Tensors
    """What every hospital reads from it (fp32); equal to B if the codec is exact."""
    carried: Tensors
    """What rounding has lost: the next round's ``owed``."""

    @classmethod
    def encode(
        cls, number: int, b: Tensors, owed: Tensors, *, codec: str, shapes: Shapes
    ) -> "Round":
        """Write the global B for the wire."""
        wire, carried = compress(codec, b, owed)
        received = {key: decode(codec, wire[key], shape) for key, shape in shapes.items()}
        return cls(number=number, b=b, owed=owed, wire=wire, received=received, carried=carried)


def save(
    run: RunDirectory,
    finished: Round,
    config: Config,
    roster: Roster,
    paces: Mapping[str, Pace],
    aggregator: Aggregator,
) -> None:
    """Write a round's checkpoint: B, and all that a resumed server goes on with."""
    run.save_checkpoint(
        f"round-{finished.number:05d}",
        finished.b,
        facts=SavedFacts(
            round=finished.number,
            b_sha256=tensors_sha256(finished.b),
            hospitals=tuple(roster.admitted),
            known=roster.known,
            federation_size=roster.federation_size,
            paces={kind: pace.as_json() for kind, pace in paces.items()},
            config=flatten(config),
            inputs=inputs_of(roster.ours),
        ),
        extra={
            **{f"{STRATEGY}{key}": value for key, value in aggregator.state.items()},
            **{f"{CARRIED}{key}": value for key, value in finished.owed.items()},
        },
    )


def load(run: RunDirectory, config: Config, ours: Fingerprints) -> Checkpoint | None:
    """Return the last checkpoint, if there is one.

    Raises:
        ChangedRun: if it is that of another configuration, A or backbone.
    """
    names = run.checkpoint_names()
    if not names:
        return None
    checkpoint = run.load_checkpoint(names[-1])
    check_unchanged(checkpoint.facts, config, ours)
    return checkpoint
