"""A hospital's round under differential privacy: charged, trained, recorded, then sent."""

from pathlib import Path

from client.kept_state import kept_steps, save_state
from client.local_update import LocalResult, LocalRound, update
from common.config import Config
from common.privacy.budget.guard import Guard
from common.privacy.settings import plan_of
from common.provenance import source_digest, tensors_sha256
from common.tensor_files import read_tensors, write_tensors
from common.training.budget import steps_of_round
from common.training.hospital_data import HospitalData
from common.wire.contract import PUBLIC_WEIGHT, Tensors

ANSWERS = "answer-*.safetensors"


def guard_of(config: Config, hospital: HospitalData, folder: Path) -> Guard:
    """Open a hospital's ledger and gradient source under the run's plan."""
    return Guard(
        plan_of(config),
        hospital=hospital.name,
        dataset=hospital.train,
        folder=folder,
        seed=config.train.seed,
        micro_batch=config.train.batch_size,
        charged=1 if any(folder.glob(ANSWERS)) else 0,
        released=kept_steps(folder),
    )


def private_update(task: LocalRound, folder: Path, *, guard: Guard | None = None) -> LocalResult:
    """Train one round under the plan; B and public constants are all that comes out.

    The result is kept on the hospital's disk before the ledger records its release, by digest: a
    server that asks for the same round from the same B again gets the same answer, at no further
    cost. An answer whose own release is not in the ledger never leaves, and neither does what its
    steps did to the optimizer: the state is kept after the release.

    The task's ``on_step`` is told no loss; ``guard`` is handed in by a caller that watches it.

    Raises:
        BudgetExhausted: if the ledger does not pay for the round; nothing is trained then.
    """
    config, server_round = task.config, task.server_round
    guard = guard or guard_of(config, task.hospital, folder)
    answer = folder / f"answer-{server_round:05d}-{tensors_sha256(task.b)[:16]}.safetensors"
    if answer.exists():
        kept = read_tensors(answer)
        if guard.ledger.released(server_round, tensors_sha256(kept)):
            return _result(kept, guard.ledger.steps)
    steps = steps_of_round(config, 0, server_round).value
    charged = guard.charge(server_round, steps)
    result = update(task, guard.source)
    for old in folder.glob(ANSWERS):
        old.unlink()
    write_tensors(answer, result.b)
    guard.release(server_round, task.session, source_digest(), result=tensors_sha256(result.b))
    if config.train.keep_state:
        save_state(folder, task.state, server_round=server_round)
    return _result(result.b, charged)


def _result(b: Tensors, charged: int) -> LocalResult:
    return LocalResult(b=b, metrics={"weight": PUBLIC_WEIGHT, "steps": float(charged)})
