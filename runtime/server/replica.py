"""A server without a socket: the whole application in a process of Ray Serve, called by a `Front`."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Scope

from ..api import Runtime
from ..distributed.ray_vision import RayVision, VisionHalf
from ..options import read_device, read_dtype
from .app import create_app
from .errors import ApiError
from .logs import configure
from .relay import End, ReplicaLost
from .service import Service, State
from .settings import Settings


class Replica:
    """Answers calls as `vitrail serve` does. Made when its model is loaded; raises what loading raises.

    What the gate of the `Front` checked is not checked again: nobody else reaches a replica.
    threads: of torch; None leaves it as it is. vision: where the vision half is, if not here.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, threads: int | None = None, vision: DeploymentHandle[VisionHalf] | None = None
    ) -> None:
        configure("warning")  # the front writes a line for every call
        if threads is not None:
            torch.set_num_threads(threads)
        inside = replace(settings, api_key=(), allowed_hosts=(), host="0.0.0.0")
        self._app = create_app(partial(_load, settings, vision), inside)
        if settings.otlp_endpoint is not None:
            from .tracing import instrument

            instrument(self._app, settings)
        self._service: Service = self._app.state.service
        self._service.on_end = lambda: os._exit(1)  # an engine that died: Ray starts another replica
        self._tasks: set[asyncio.Task[None]] = set()
        await self._service.start()
        while self._service.loading:
            await asyncio.sleep(0.02)
        if self._service.failure is not None:
            raise self._service.failure

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """ASGI messages, all that there are at a time, and last an `End`. Closing it ends the call.

        Raises `ReplicaLost` when the engine died before the answer began: another replica may answer.
        """
        written: list[Message] = []
        news, left = asyncio.Event(), asyncio.Event()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            written.append(message)
            news.set()

        scope = {**scope, "type": "http", "asgi": {"version": "3.0"}, "state": {}}
        task = asyncio.get_running_loop().create_task(self._app(scope, receive, send))
        self._tasks.add(task)  # it ends by itself, soon after the caller has left
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: news.set())
        begun = False
        try:
            while written or not task.done():
                await news.wait()
                news.clear()
                if written:
                    if not begun and self._service.dead:
                        raise ReplicaLost
                    begun, batch, written = True, written, []
                    yield batch
            yield [{"type": "vitrail.end", "end": _end_of(scope)}]
        finally:
            left.set()

    async def state(self) -> State:
        """What the service can do."""
        return self._service.state

    async def metrics(self) -> tuple[str, bytes]:
        """A name that stays when the replica is replaced, and its metrics."""
        return str(serve.get_replica_context().rank.rank), self._service.metrics.expose()

    async def check_health(self) -> None:
        """Raise when the replica should be replaced; Ray Serve asks now and then."""
        if self._service.dead:
            raise RuntimeError("the engine failed")

    async def __del__(self) -> None:  # Ray Serve awaits it once the last call has ended
        await self._service.stop()


def _load(settings: Settings, vision: "DeploymentHandle[VisionHalf] | None") -> Runtime:
    options = settings.runtime_options()
    if vision is not None:
        device, dtype = read_device(settings.device), read_dtype(settings.dtype)
        options["vision_workers"] = RayVision(vision, settings.vision_replicas, device=device, dtype=dtype)
    return Runtime.from_pretrained(settings.model, **options)


def _end_of(scope: Scope) -> End:
    flight = scope["state"].get("flight")
    reason: ApiError | None = None if flight is None else flight.reason
    return End(
        getattr(scope.get("route"), "path", "other"),
        None if reason is None else reason.status,
        {} if flight is None else flight.describe(),
    )
