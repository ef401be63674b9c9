"""Answer a SuperNode's tasks in the place of Flower's own executor, which would run the bundle.

The SuperNode runs with ``--isolation process``: it hands its tasks to whoever holds its secret,
and that is this process alone. Flower's calls are those of its own ``flwr-clientapp``.
"""

import functools
import logging
import time
from collections.abc import Callable

import httpx
from flwr.app import Context, Error, Message

from common.errors import FedrxError
from common.wire.undocumented_deployment import (
    AcquireTaskRequest,
    ErrorCode,
    HeartbeatSender,
    ProtobufClientInterceptor,
    RetryInvoker,
    RuntimeHttpClient,
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SendTaskHeartbeatRequest,
    SubStatus,
    SuperExecAuthHttpInterceptor,
    TaskType,
    make_simple_http_retry_invoker,
    pull_task_input,
    push_message,
    push_task_output,
)

POLL_SECONDS = 0.5
Respond = Callable[[Message, Context, bytes], Message]
"""Gets message, context and the bundle's bytes; returns the reply or raises."""
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_log = logging.getLogger(__name__)


def answer_tasks(
    address: str, secret: bytes, respond: Respond, *, check: Callable[[], None]
) -> None:
    """Answer one task after another until ``check``, which is called between them, raises."""
    # Only apps of hospitals: a server may not start agents, models or connectors here.
    wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})
    with _runtime(address, auth) as client:
        while True:
            check()
            try:
                found = client.AcquireTask(wanted)
            except httpx.TransportError:  # the SuperNode starts, or has ended
                time.sleep(POLL_SECONDS)
                continue
            if found.HasField("task") and found.token:
                _answer_one(address, found.token, respond)
            else:
                time.sleep(POLL_SECONDS)


def _runtime(
    address: str, interceptor: ProtobufClientInterceptor, retry: RetryInvoker | None = None
) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), interceptor],
        retry_invoker=retry,
    )


def _answer_one(address: str, token: str, respond: Respond) -> None:
    retry = make_simple_http_retry_invoker()
    with _runtime(address, RuntimeTokenHttpInterceptor(token), retry) as client:
        heartbeat = HeartbeatSender(functools.partial(_beat, client))
        heartbeat.start()
        context, status, details = None, SubStatus.FAILED, ""
        try:
            message, context, _, bundle = pull_task_input(client)
            try:
                reply = respond(message, context, bundle.content)
                status = SubStatus.COMPLETED
            except Exception as error:
                # What is not ours may quote data: only its type leaves.
                text = str(error) if isinstance(error, FedrxError) else "see the hospital's log"
                details = f"{type(error)}:<'{text}'>"
                _log.warning("a message is refused: %s", details)
                code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                reply = Message(Error(code=code, reason=details), reply_to=message)
            push_message(client, reply, context)
        except (httpx.HTTPError, RuntimeError, ValueError) as error:
            _log.warning("a task is lost: %s", type(error).__name__)
            status = SubStatus.FAILED
        finally:
            push_task_output(client, context, status, details)
            heartbeat.stop()


def _beat(client: RuntimeHttpClient) -> bool:
    """Tell the SuperNode that its task is worked on; False: try again soon.

    Of a task that it has given up, because this machine stood still for a minute, the answer is
    refused; Flower's own heartbeat would interrupt the whole hospital, or end and be missed.
    """
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError:
        return False
    return True
