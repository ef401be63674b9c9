"""Flower's own parts that a deployment stands on and that its documentation does not name.

Tasks of a SuperNode (as its ``flwr-clientapp`` takes them), the SuperLink's account plug-in, and
the file of tokens. Seen in flwr 1.41.0 and 1.42.0.
"""

from flwr.cli.constant import ACCESS_TOKEN_STORE_KEY, AUTHN_TYPE_STORE_KEY, REFRESH_TOKEN_STORE_KEY
from flwr.common.constant import (
    ACCESS_TOKEN_KEY,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    AuthnType,
    ErrorCode,
    SubStatus,
)
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.supercore.constant import TaskType
from flwr.supercore.credential_store import FileCredentialStore
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.auth_plugin import ControlAuthnPlugin
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

SUPERLINK_COMMAND = "flwr.superlink.cli.flower_superlink"
