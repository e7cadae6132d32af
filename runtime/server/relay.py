"""A call on its way to a replica and back, and what may happen to it there.

A replica that ends takes no call with it whose answer has not begun: another one gets it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.types import Message, Scope, Send

from .errors import ApiError
from .logs import log

ATTEMPTS = 2
_TOLD = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client", "server")


class ReplicaLost(Exception):  # noqa: N818 - what happened, which is no fault of who raises it
    """The replica that had a call is no more."""


class Replicas(Protocol):
    """Those who answer."""

    def send(self, scope: dict[str, Any], body: bytes, key: str) -> AsyncGenerator[list[Message], None]:
        """What one of them answers: ASGI messages as they come, then an `End`'s. Raises `ReplicaLost`.

        key: calls of equal keys should go to the same one. Closing the generator ends the call there.
        """

    async def ask(self, method: str) -> list[Any]:
        """What each of them says to a call of `method`."""


@dataclass
class End:
    """How a call ended in its replica, for the log: what a `Flight` is in a server of its own."""

    route: str = "other"
    status: int | None = None  # if it is another than the one that was written, which a stream cannot take back
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.route

    @property
    def reason(self) -> ApiError | None:
        return None if self.status is None else ApiError(self.status, "")

    def describe(self) -> dict[str, Any]:
        return self.fields


class Call:
    """One call: how far its answer is, and what ends it early."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.streams = self.written = False
        self.over: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()

    def abort(self, reason: ApiError) -> None:
        if not self.over.done():
            self.over.set_result(reason)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            # The gate adds the request's id, which is the same.
            headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            self.streams = any(pair[0] == b"content-type" and b"event-stream" in pair[1] for pair in headers)
            message = {**message, "headers": headers}
        self.written = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def pass_on(self, replicas: Replicas, scope: Scope, body: bytes, key: str) -> None:
        """Send it to a replica and what comes back to its caller; to another replica if that is lost before."""
        request_id = scope["state"]["request_id"]
        headers = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
        told = {name: scope[name] for name in _TOLD if name in scope}
        told["headers"] = [*headers, (b"x-request-id", request_id.encode())]
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with aclosing(replicas.send(told, body, key)) as answer:
                    async for messages in answer:
                        for message in messages:
                            if message["type"] == "vitrail.end":
                                scope["route"] = scope["state"]["flight"] = message["end"]
                                return
                            await self.send(message)
                raise ReplicaLost
            except ReplicaLost as error:
                log("replica lost", logging.WARNING, request_id=request_id, attempt=attempt, begun=self.begun)
                if self.begun or attempt == ATTEMPTS:
                    message_ = "the replica that had the request ended"
                    raise ApiError(503, message_, code="replica_lost", retry_after=1) from error
