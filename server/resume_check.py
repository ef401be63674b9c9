"""What a run's last checkpoint says, and whether the run may go on from it."""

from collections.abc import Mapping
from typing import Any

from common.config import Config
from common.configio import differences, from_flat
from common.errors import RunFailed
from common.wire.contract import Fingerprints

COUNTED = "federation.hospitals"
"""The hospitals say how many they are; the handshake compares that."""


class ChangedRun(RunFailed):
    """The run directory is another run's: it is left as it is."""


def inputs_of(ours: Fingerprints) -> dict[str, str]:
    """Return what a resumed run must share with its checkpoint; the source may change."""
    return {"a": ours.a, "backbone": ours.backbone}


def check_unchanged(facts: Mapping[str, Any], config: Config, ours: Fingerprints) -> None:
    """Compare a checkpoint's configuration and fingerprints with this process's.

    Args:
        facts: The checkpoint's.
        config: As Flower hands it over.
        ours: The server's fingerprints.

    Raises:
        ChangedRun: naming everything that differs, with both values.
    """
    changes = [
        str(change)
        for change in differences(from_flat(facts["config"]), config)
        if not change.key.startswith(COUNTED)
    ]
    now = inputs_of(ours)
    changes += [
        f"{name} fingerprint: {value} -> {now[name]}"
        for name, value in facts["inputs"].items()
        if value != now[name]
    ]
    if changes:
        raise ChangedRun(
            "a run goes on as it began; changed: "
            + "; ".join(changes)
            + "; fix: undo the change, or name another run.directory"
        )
