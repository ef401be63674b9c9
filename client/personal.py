"""A hospital's personal adapter: B_own, trained beside the global B, which stays on its own disk.

    y = W x + s (B_global + B_own) A x

B_own is trained with as many steps as the global update of each round, from the same B that the
server sent, without noise, and carried over rounds. What the hospital sends is computed before, and
is the same without it: so it costs no epsilon, and answers made with it are covered by none.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from client.kept_state import keep, load_kept
from client.local_update import LocalRound
from common.errors import UserError
from common.privacy.settings import is_private
from common.rundir import Checkpoint, RunDirectory
from common.tensor_files import Tensors, under
from common.training.budget import steps_before_round, steps_in_all, steps_of_round
from common.training.loop import train
from common.training.optimiser import TrainState

PERSONAL = "personal"
_OWN, _STATE = "own.", "state."


def train_own(task: LocalRound, folder: Path) -> None:
    """Train B_own for one round with the global B frozen, and keep it in the hospital's folder."""
    session, hospital, config = task.session, task.hospital, task.config
    server_round = task.server_round
    kept = load_kept(folder, PERSONAL, before_round=server_round)
    own, carried = under(_OWN, kept), under(_STATE, kept)
    samples = 0 if is_private(config) else len(hospital.train)
    state = TrainState(step=steps_before_round(config, samples, server_round))
    if carried and config.train.keep_state:
        state = TrainState.from_tensors(carried)
    session.adapter.load(with_own(task.b, own))
    session.adapter.start_round(server_round)
    train(
        session,
        hospital.train,
        config.train,
        state,
        steps=steps_of_round(config, samples, server_round).value,
        schedule_steps=steps_in_all(config, samples).value,
        stream=f"{hospital.name} {PERSONAL}",
    )
    found = {_OWN + key: value - task.b[key] for key, value in session.adapter.state().items()}
    found |= {_STATE + key: value for key, value in state.to_tensors().items()}
    keep(folder, PERSONAL, found, server_round=server_round)


def own_b(folder: Path) -> Tensors:
    """Return a hospital's last B_own, from its own folder; empty if it has none."""
    return under(_OWN, load_kept(folder, PERSONAL, before_round=sys.maxsize))


def with_own(b: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]) -> Tensors:
    """Return B_global + B_own (fp32); without an own one, B_global."""
    return {key: value + own[key] if own else value for key, value in b.items()}


def b_of(run: RunDirectory, loaded: Checkpoint, hospital: str) -> Tensors:
    """Return the B that answers for one hospital: B_global + B_own; for ``""`` B_global.

    Args:
        run: A run on whose disk hospitals keep their own B.
        loaded: Its checkpoint; there is an own B beside the last alone.
        hospital: Name.

    Raises:
        UserError: If the hospital has no own B there.
    """
    if not hospital:
        return loaded.b
    folder = run.path / "hospitals"
    able = sorted(one.name for one in folder.glob("*") if one.is_dir() and own_b(one))
    if hospital not in able or loaded.name != run.checkpoint_names()[-1]:
        raise UserError(
            f"{run.path} has no personal adapter of {hospital} beside {loaded.name}",
            allowed=f"the last checkpoint, with {', '.join(able)}"
            if able
            else "a run that trains them: adapter.personal = true",
            fix="name one of these hospitals, and no --checkpoint" if able else "train another run",
        )
    return with_own(loaded.b, own_b(folder / hospital))
