"""What a hospital's handshake and the run's configuration say of its replies beforehand."""

from common.config import Config
from common.errors import UserError
from common.privacy.plan import PrivacyPlan
from common.privacy.settings import HOSPITAL
from common.training.budget import steps_of_round
from common.wire.contract import ContractError, Due
from common.wire.handshake import Handshake


def train_due(config: Config, handshake: Handshake, server_round: int) -> Due:
    """Return weight and steps of an honest reply to a train message, without privacy.

    Raises:
        ContractError: if the hospital told so few samples that it has no steps to take.
    """
    try:
        steps = steps_of_round(config, handshake.train_samples, server_round).value
    except UserError:
        raise ContractError("it told too few training samples for a step a round") from None
    return Due(weight=float(handshake.train_samples), steps=steps)


def steps_expected(config: Config, handshake: Handshake, server_round: int) -> int:
    """Return the steps that the wait for a hospital's round is sized from; at least one."""
    try:
        return max(1, steps_of_round(config, handshake.train_samples, server_round).value)
    except UserError:  # the hospital meets it too, and fails alone
        return 1


def private_steps(config: Config, plan: PrivacyPlan | None, server_round: int) -> int:
    """Return the steps that a round costs under the privacy plan; 0 without one."""
    if plan is None:
        return 0
    return 1 if plan.unit == HOSPITAL else steps_of_round(config, 0, server_round).value


def most_validation_tokens(config: Config, handshake: Handshake) -> int:
    """Return the most answer tokens that a hospital's validation loss can be the mean of."""
    samples, limit = handshake.validation_samples, config.evaluation.validation_samples
    return config.train.max_length * (min(samples, limit) if limit > 0 else samples)
