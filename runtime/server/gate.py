"""What stands before every route: a request's id, who may call, how large a body may be, the log and the counts.

The key covers every route but /health, and the page at /, which holds nothing and asks for the key.
"""

import asyncio
import hmac
import logging
import re
from contextlib import suppress
from time import perf_counter
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import CLIENT_CLOSED_REQUEST, ApiError
from .exchange import JsonResponse
from .logs import log
from .metrics import Metrics
from .service import Flight
from .settings import Settings

OPEN_PATHS = frozenset({"/health", "/"})
DRAINED_BYTES = 8 * 2**20  # of a body that is not wanted: a client that still writes would not read the answer
DRAIN_S = 5
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._keys = [key.encode() for key in settings.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets here; the server refuses the handshake of an application that says nothing
        await _Call(self, scope, receive, send).run()

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise `ApiError` unless the call may come in."""
        host = headers.get("host", "").lower()
        name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        if self._settings.hosts and name not in self._settings.hosts:
            raise ApiError(403, "the Host header names another server; see --allowed-hosts", code="host_not_allowed")
        if self._keys and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            offered = given.strip().encode("latin-1")
            # All of them, so that time tells neither which key is near nor how many there are.
            found = [hmac.compare_digest(offered, key) for key in self._keys]
            if scheme.lower() != "bearer" or not any(found):
                raise ApiError(401, "a valid API key is needed, as Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._settings.max_request_bytes:
            raise self.too_large()

    def too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds the limit of {self._settings.max_request_bytes} bytes")


class _Call:
    """One call on its way through the gate."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self._gate = gate
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = Headers(scope=scope)
        given = self._headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        self._num_bytes = 0
        self._more_body = True
        self._status = 0

    async def run(self) -> None:
        gate, scope, start = self._gate, self._scope, perf_counter()
        scope.setdefault("state", {})["request_id"] = self.request_id
        try:
            gate.check(scope, self._headers)
            await gate._app(scope, self.receive, self.send)
        except ApiError as error:
            await self._refuse(error)
        except ClientDisconnect:
            self._status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            log("request failed", logging.ERROR, request_id=self.request_id, exc_info=error)
            await self._refuse(ApiError(500, "the request failed inside the server", code="internal_error"))
        finally:
            flight: Flight | None = scope["state"].get("flight")
            # Of a stream the status was written before it was known how that ends.
            status = self._status if flight is None or flight.reason is None else flight.reason.status
            route = getattr(scope.get("route"), "path", "other")  # any path that a caller makes up
            gate._metrics.responses.labels(route, str(status)).inc()
            log(
                "request",
                logging.DEBUG if route in ("/health", "/ready", "/metrics") else logging.INFO,
                request_id=self.request_id,
                method=scope["method"],
                route=route,
                status=status,
                ms=round((perf_counter() - start) * 1e3, 1),
                **({} if flight is None else flight.describe()),
            )

    async def receive(self) -> Message:
        """The next message; the body is counted, and refused where it grows too large."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._more_body = message.get("more_body", False)
            if self._num_bytes > self._gate._settings.max_request_bytes:
                raise self._gate.too_large()
        else:
            self._more_body = False
        return message

    async def send(self, message: Message) -> None:
        """Send, with the request's id in the header; a body that nobody wanted is read first."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            await self._drain()
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        await self._send(message)

    async def _drain(self) -> None:
        announced = self._headers.get("content-length", "0")
        if self._headers.get("expect") or not announced.isdigit() or int(announced) > DRAINED_BYTES:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._more_body and self._num_bytes <= DRAINED_BYTES:
                    message = await self._receive()
                    self._num_bytes += len(message.get("body", b""))
                    self._more_body = message.get("more_body", False)

    async def _refuse(self, error: ApiError) -> None:
        if self._status:
            return  # something was sent before: all that is left is to end the connection
        await JsonResponse(error.body, error.status, headers=error.headers)(self._scope, self._receive, self.send)
