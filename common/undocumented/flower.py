"""Flower: its protocol buffers, who runs a task, its strategies' errors, and a private seam.

Seen alike in 1.41.0 and 1.42.0. Beside ``common.wire.contract`` the only module of ``common`` that
imports Flower; nothing in ``common`` imports it.
"""

from abc import abstractmethod
from typing import Any

from flwr.app import ArrayRecord
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp.exception import AppExitException
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "NO_UPDATE_CHECK",
    "AppExitException",
    "FixedClippingWithOwnNoise",
    "ProtoContext",
    "ProtoMessage",
    "TaskIdentity",
    "context_from_proto",
    "context_to_proto",
    "message_from_proto",
    "message_to_proto",
]

NO_UPDATE_CHECK = "FLWR_DISABLE_UPDATE_CHECK"
"""``1``: the commands do not ask for newer releases."""


class FixedClippingWithOwnNoise(DifferentialPrivacyServerSideFixedClipping):
    """Flower's fixed clipping, with a seam for noise and for a round without ``configure_train``.

    Flower draws the noise from numpy's global generator, and enters a release into its accountant
    only where it also chooses the nodes itself.
    """

    def enter_release(self, server_round: int) -> None:
        """Enter one round's release into the accountant."""
        self._prepare_accounting(server_round, [None] * self.num_sampled_clients)

    @abstractmethod
    def noised(self, aggregated_arrays: ArrayRecord) -> ArrayRecord:
        """Return the clipped mean with noise."""

    def _add_noise_to_aggregated_arrays(
        self, aggregated_arrays: ArrayRecord, *args: Any, **kwargs: Any
    ) -> ArrayRecord:
        return self.noised(aggregated_arrays)
