"""What a hospital answers to each kind of message: unpack, call ``client.local_update``, pack."""

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client.epsilon_limit import LimitReached, keep_to_limit, keep_to_steps
from client.kept_state import (
    STEPS,
    forget_steps,
    keep,
    load_kept,
    load_state,
    own_folder,
    save_state,
)
from client.local_update import LocalRound, evaluate, update
from client.node import hospital_of, local_config, own_policy, private_folder
from client.personal import train_own
from client.private_update import private_update
from client.site import NAME
from common.choice import travelling_reason
from common.config import Config
from common.configio import from_flat
from common.errors import DiskFull, RunFailed, SettingError
from common.files import append_json_line, for_owner
from common.privacy.budget.guard import LEDGER
from common.privacy.budget.ledger import BudgetExhausted, LedgerDoubtful
from common.privacy.settings import is_private, plan_of, protects
from common.provenance import source_digest
from common.records.run import StepLine
from common.tensor_files import Altered
from common.training.budget import steps_before_round
from common.training.loop import StepReport
from common.training.optimiser import TrainState
from common.training.worker import Worker
from common.wire.codecs import compress, is_lossy
from common.wire.contract import (
    CONFIG,
    ContractError,
    Tensors,
    evaluate_reply,
    only_record,
    read_message,
    train_reply,
)
from common.wire.identity import NONCE, NONCE_PATTERN, SIGNATURE, sign

ERRORS = "errors.txt"
DATA_FREE = (ContractError, BudgetExhausted, LedgerDoubtful, LimitReached, DiskFull)
"""Errors whose texts are made of public constants alone."""
Handler = Callable[[Config, Message, Context, Worker], RecordDict]


def answer_handshake(
    config: Config, message: Message, context: Context, worker: Worker
) -> RecordDict:
    """Answer the handshake: name, fingerprints, sizes, and what was chosen with the reasons."""
    hospital = hospital_of(config, context.node_config, worker)
    session = worker.session(config)
    worker.report(config)
    facts: dict[str, str | int] = {
        "hospital": hospital.name,
        "a-sha256": session.adapter.a_fingerprint,
        "backbone-sha256": session.spec.fingerprint_as(session.weights.value, config.text),
        "source-sha256": source_digest(),
        "of": config.federation.hospitals,
        "device": session.device.value,
        "dtype": session.dtype.value,
        "dtype-reason": session.dtype.reason,
        "attention": session.attention.value,
        "attention-reason": travelling_reason(session.attention.reason),
    }
    if protects(config):
        facts["privacy-plan-sha256"] = plan_of(config).fingerprint
    else:
        facts |= {
            "patients": hospital.patients,
            "samples": hospital.samples,
            "train-samples": len(hospital.train),
            "validation-samples": len(hospital.validation),
        }
    nonce = asked_nonce(message)
    if nonce and NAME in context.node_config:
        folder = Path(str(context.node_config["folder"]))
        facts[SIGNATURE] = sign(folder, nonce, context.node_id, facts)
    return RecordDict({CONFIG: ConfigRecord(dict(facts))})


def asked_nonce(message: Message) -> str:
    """Return the number that the server wants signed; empty if it wants none.

    Raises:
        ContractError: if it is no such number.
    """
    nonce = only_record(message.content, CONFIG).get(NONCE, "")
    if nonce != "" and not (isinstance(nonce, str) and NONCE_PATTERN.fullmatch(nonce)):
        raise ContractError(f"scalar {NONCE!r} is not 32 hexadecimal digits")
    return nonce


def train_round(config: Config, message: Message, context: Context, worker: Worker) -> RecordDict:
    """Train one round from the global B."""
    hospital = hospital_of(config, context.node_config, worker)
    session = worker.session(config)
    b, server_round = received(config, message, context, worker)
    folder = private_folder(config, hospital.name)
    private = is_private(config)
    policy = own_policy(context.node_config)
    if policy and not private:
        keep_to_steps(config, policy, len(hospital.train))
    if config.train.keep_state:
        state = load_state(folder, before_round=server_round)
    else:
        # A fresh optimizer, but not the first batches again.
        samples = 0 if private else len(hospital.train)
        state = TrainState(step=steps_before_round(config, samples, server_round))
    forget_steps(folder, from_round=server_round)

    def log(step: StepReport) -> None:
        seconds = round(step.seconds, 3)
        line = StepLine(round=server_round, step=step.step, loss=step.loss, seconds=seconds)
        append_json_line(folder / STEPS, line.as_json())

    tokens = worker.tokens(config, hospital)
    task = LocalRound(session, tokens, b, state, config, server_round, on_step=log)
    if private:
        result = private_update(task, folder)
    else:
        result = update(task)
        if config.train.keep_state:
            save_state(folder, state, server_round=server_round)
    worker.count(config, result.tokens, result.metrics.get("seconds", 0.0))
    worker.report(config)
    metrics = {"round": float(server_round), **result.metrics}
    if protects(config) and not private:
        # hospital-level: the server pays, one release a round; it is told nothing but B
        metrics = {"round": float(server_round), "weight": 1.0, "steps": float(server_round)}
    wire = in_codec(config, folder, result.b, b, server_round)
    if config.adapter.personal:
        try:
            train_own(task, folder)
        except Exception:  # whether it works depends on the data, and what is sent must not
            _keep_traceback(config)
    return train_reply(wire, metrics, private=protects(config))


def received(
    config: Config, message: Message, context: Context, worker: Worker
) -> tuple[Tensors, int]:
    """Return the B and the round that the server sent, checked.

    Raises:
        ContractError: for a broken contract, or an entry beyond what the hospital's policy allows.
    """
    shapes = worker.session(config).adapter.shapes
    b, server_round = read_message(message.content, shapes, config.federation.codec)
    policy = own_policy(context.node_config)
    if policy:
        for key, value in b.items():
            if np.abs(value).max() > policy.max_parameter:
                raise ContractError(f"{key}: holds an entry beyond {policy.max_parameter:g}")
    return b, server_round


def in_codec(config: Config, folder: Path, b: Tensors, base: Tensors, server_round: int) -> Tensors:
    """Write the updated B for the wire; with a lossy codec its change, and keep what was lost."""
    codec = config.federation.codec
    if not is_lossy(codec):
        return b
    carried = load_kept(folder, "carried", before_round=server_round)
    change = {key: value - base[key] for key, value in b.items()}
    wire, left = compress(codec, change, carried)
    keep(folder, "carried", carried | left, server_round=server_round)
    return wire


def evaluate_round(
    config: Config, message: Message, context: Context, worker: Worker
) -> RecordDict:
    """Return the validation loss of the global B."""
    if protects(config):
        raise ContractError("with privacy on, no loss leaves a hospital")
    hospital = hospital_of(config, context.node_config, worker)
    session = worker.session(config)
    b, server_round = received(config, message, context, worker)
    metrics = evaluate(session, worker.tokens(config, hospital), b)
    worker.report(config)
    return evaluate_reply({"round": float(server_round), **metrics})


HANDLERS: dict[str, Handler] = {
    "query": answer_handshake,
    "train": train_round,
    "evaluate": evaluate_round,
}


def answer(kind: str, message: Message, context: Context, worker: Worker) -> Message:
    """Answer one message; only clean error texts leave.

    These are the texts that never hold anything of the data, and with privacy off those about the
    settings that the server sent. What else went wrong, a path or a count, is in the hospital's
    own ``errors.txt``.

    Raises:
        FedrxError: with a text that quotes no data and no path.
    """
    sent = from_flat(context.run_config)
    config = local_config(sent, context.node_config, context.run_id)
    try:
        own_folder(Path(config.run.directory))
        _check_round(kind, config, message)
        policy = own_policy(context.node_config)
        if policy:
            folder = Path(str(context.node_config["folder"]))
            keep_to_limit(
                sent,
                policy,
                folder,
                ledger=private_folder(config, str(context.node_config[NAME])) / LEDGER,
                patients=lambda: hospital_of(config, context.node_config, worker).patients,
            )
        return Message(content=HANDLERS[kind](config, message, context, worker), reply_to=message)
    except Exception as error:
        if _may_leave(error, config):
            raise
        _keep_traceback(config)
        reason = f"the reason stays in the hospital, in {ERRORS}"
        if not protects(config):
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            reason = f"{type(error).__name__} at {where}; {reason}"
        raise RunFailed(reason) from None


def _check_round(kind: str, config: Config, message: Message) -> None:
    """Refuse a round that the run does not have, before anything is done for it."""
    first = 1 if kind == "train" else 0
    for record in message.content.config_records.values():
        number = record.get("round", first)
        if type(number) is int and not first <= number <= config.federation.rounds:
            raise ContractError("the round is none of this run's")


def _may_leave(error: Exception, config: Config) -> bool:
    if isinstance(error, DATA_FREE) or protects(config):
        return isinstance(error, DATA_FREE)
    return isinstance(error, (SettingError, Altered, RunFailed))


def _keep_traceback(config: Config) -> None:
    with contextlib.suppress(OSError):  # its text would hold the hospital's path
        file = own_folder(Path(config.run.directory) / "hospitals") / ERRORS
        with open(file, "a", encoding="utf-8", opener=for_owner) as stream:
            stream.write(traceback.format_exc() + "\n")
