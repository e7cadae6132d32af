"""The application that callers reach where replicas answer: it lets calls in, and each goes to a replica and back.

What a single server checks before it reads a request is checked here, by the same gate: key, host, size.
"""

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .exchange import BODY_S, LARGE_BODY, JsonResponse, event
from .gate import Gate
from .joined import FRONT, joined
from .logs import log
from .metrics import CONTENT_TYPE, Metrics
from .picture_key import picture_key
from .relay import Call, End, Replicas
from .service import State
from .settings import Settings

LOOK_S = 1.0  # how often replicas are asked how they are
PATIENCE_S = 10.0  # without any replica, after which calls that wait for one are refused


class Front:
    """An ASGI application. With `run` of `main.py` it is drained as a `Service` is."""

    def __init__(self, replicas: Replicas, settings: Settings) -> None:
        self.settings = settings
        self.on_end: Callable[[], None] = lambda: None
        self._replicas = replicas
        self._metrics = Metrics()
        self._gate = Gate(self._answer, settings, self._metrics)
        self._calls: set[Call] = set()
        self._num_ready = 0
        self._draining = False
        self._watch: asyncio.Task[None] | None = None
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gate(scope, receive, send)

    # --- life ---

    @property
    def started(self) -> bool:
        return self._watch is not None

    @property
    def state(self) -> State:
        """Ready if one replica is."""
        return State.DRAINING if self._draining else State.READY if self._num_ready else State.LOADING

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan."""
        assert (await receive())["type"] == "lifespan.startup"
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._look())
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        for task in (self._watch, self._drain):
            if task is not None:
                task.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _look(self) -> None:
        """Ask the replicas how they are, over and over."""
        seen = self._loop.time()
        while True:
            with suppress(Exception):  # who is too busy to answer is still there
                states = await self._replicas.ask("state")
                before, self._num_ready = self._num_ready, states.count(State.READY)
                if before != self._num_ready:
                    log("replicas", ready=self._num_ready, model=self.settings.name)
            if self._num_ready:
                seen = self._loop.time()
            elif self._loop.time() - seen > PATIENCE_S:
                for call in self._calls:
                    call.abort(self._nobody())
            await asyncio.sleep(LOOK_S if self._num_ready else LOOK_S / 5)

    def _nobody(self) -> ApiError:
        return ApiError(503, "no replica is ready", code="loading", retry_after=5)

    def drain_soon(self) -> None:
        """`drain`, from a signal's handler."""
        self._loop.call_soon_threadsafe(self.drain)

    def keep_signals(self) -> None:
        """Have Python handle the signals again that it handled before a library put its own handlers there."""
        self._loop.call_soon_threadsafe(_install_signals)

    def drain(self) -> None:
        """Take no more calls, and end when those there are have ended, or have been given time to."""
        if not self._draining:
            self._draining = True
            log("draining", requests=len(self._calls), timeout_s=self.settings.shutdown_timeout)
            self._drain = self._loop.create_task(self._end_when_empty())

    async def _end_when_empty(self) -> None:
        for seconds in (self.settings.shutdown_timeout, 5.0):
            end = self._loop.time() + seconds
            while self._calls and self._loop.time() < end:
                await asyncio.sleep(0.02)
            for call in self._calls:
                call.abort(ApiError(503, "the server is shutting down", code="shutting_down"))
        self.on_end()

    # --- calls ---

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        own = {"/health": self._health, "/ready": self._ready, "/metrics": self._prometheus}.get(scope["path"])
        if own is None or scope["method"] != "GET":
            await self._forward(scope, receive, send)
            return
        scope["route"] = End(scope["path"])
        response = await own()
        await response(scope, receive, send)

    async def _health(self) -> Response:
        return JsonResponse({"status": self.state})

    async def _ready(self) -> Response:
        self._check_ready()
        return JsonResponse({"status": self.state})

    async def _prometheus(self) -> Response:
        parts = [(FRONT, self._metrics.expose()), *await self._replicas.ask("metrics")]
        return Response(joined(parts), media_type=CONTENT_TYPE)

    def _check_ready(self) -> None:
        if self._draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if not self._num_ready:
            raise self._nobody()

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_ready()
        room = self._num_ready * (self.settings.max_num_seqs + self.settings.max_num_queued_reqs)
        if len(self._calls) >= room:  # before its body takes memory; a replica counts answers, and more exactly
            raise ApiError(429, "too many requests are waiting already", code="overloaded", retry_after=1)
        call = Call(send)
        self._calls.add(call)
        try:
            try:
                async with asyncio.timeout(BODY_S):
                    body = await Request(scope, receive).body()
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {BODY_S} s", code="timeout") from None
            key = picture_key(body) if len(body) < LARGE_BODY else await asyncio.to_thread(picture_key, body)
            await self._until_over(call, call.pass_on(self._replicas, scope, body, key), receive)
        except ApiError as error:
            if not call.streams:
                raise
            await send({"type": "http.response.body", "body": event(error.body)})
        finally:
            self._calls.discard(call)

    async def _until_over(self, call: Call, work: Any, receive: Receive) -> None:
        """Do `work` until it is done, its client leaves, it is aborted, or its time is up."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_departure(receive))
        try:
            timeout = self.settings.request_timeout + PATIENCE_S  # of the replica, which says more, and of the way
            done, _ = await asyncio.wait({working, leaving, call.over}, timeout=timeout, return_when="FIRST_COMPLETED")
            if leaving in done and call.written:  # the caller has all of it; what is still to come is for the log
                done, _ = await asyncio.wait({working}, timeout=LOOK_S)
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)
        if working in done:
            working.result()
        elif call.over in done:
            raise call.over.result()
        elif leaving in done:
            raise ClientDisconnect
        elif not call.written:
            raise ApiError(504, "the request took longer than the server allows", code="timeout")


def _install_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.getsignal(number))


async def _departure(receive: Receive) -> None:
    """Wait until the caller leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
