"""Bodies in, answers and event streams out, and what happens when the client leaves in the middle."""

import asyncio
import difflib
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..errors import VitrailError
from ..request import GenerationConfig, StreamDelta
from .errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error
from .logs import log
from .schemas import ChatBody, CompletionBody
from .service import Flight, Service

B = TypeVar("B", bound=BaseModel)
G = TypeVar("G", ChatBody, CompletionBody)

LARGE_BODY = 64 * 2**10  # bytes that take longer to parse than the event loop should stand still
BODY_S = 60  # in which a body must arrive: until then it takes the place of a request
DONE = b"data: [DONE]\n\n"
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class JsonResponse(JSONResponse):
    """An object as compact JSON."""

    def render(self, content: Any) -> bytes:
        return dump(content)


def dump(content: Any) -> bytes:
    """`content` as compact JSON. Answers may hold half a surrogate pair no more than UTF-8 may: it is replaced."""
    return _ENCODE(content).encode("utf-8", "replace")


def event(content: Any) -> bytes:
    """`content` as a server-sent event."""
    return b"data: " + dump(content) + b"\n\n"


async def read_body(request: Request, kind: type[B]) -> B:
    """The body of a request as a `kind`. Raises `ApiError` naming the first field that is wrong."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # also what makes a browser ask before a foreign page may send anything
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.body()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S} s", code="timeout") from None
    try:
        if len(body) < LARGE_BODY:
            return kind.model_validate_json(body)
        return await asyncio.to_thread(kind.model_validate_json, body)
    except ValidationError as error:
        raise await asyncio.to_thread(_mistake, error, body, kind) from None


def _mistake(error: ValidationError, body: bytes, kind: type[BaseModel]) -> ApiError:
    """What is wrong with a body, without repeating what was in it."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    sent = json.loads(body)
    # Of a union every member complains: the one that came furthest is what the caller meant.
    places, first = max(((_places(one, sent), one) for one in errors), key=lambda pair: len(pair[0]))
    param = ".".join(places) or None
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(places[-1], [*kind.model_fields], n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest and len(places) == 1 else ""
        return ApiError(400, f"{param}: there is no such field{hint}", param=param, code="unknown_parameter")
    return ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param)


def _places(error: ErrorDetails, sent: Any) -> list[str]:
    """The path to what an error is about, without the names of members of unions that pydantic puts into it."""
    places = []
    path: tuple[Any, ...] = error["loc"]
    for place in path:
        if (isinstance(sent, dict) and place in sent) or (isinstance(sent, list) and isinstance(place, int)):
            places.append(str(place))
            sent = sent[place]
    if error["type"] == "missing":
        places.append(str(error["loc"][-1]))
    return places


@asynccontextmanager
async def flight_of(service: Service, request: Request) -> AsyncIterator[Flight]:
    """Let a call in, and out again when the block ends, unless a stream goes on with it (`Flight.streams`)."""
    flight = request.state.flight = service.enter(request.state.request_id)
    try:
        yield flight
    except BaseException:
        flight.close()
        raise
    if not flight.streams:
        flight.close()


def watch_client(request: Request, flight: Flight) -> None:
    """Abort a flight as soon as its client leaves. The body must have been read."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        flight.abort(ApiError(CLIENT_CLOSED_REQUEST, "the client went away"))

    flight.watcher = asyncio.get_running_loop().create_task(watch())


class EventStream(Response):
    """Server-sent events, those that came together in one piece. The flight ends with the stream, however that ends."""

    media_type = "text/event-stream"

    def __init__(self, flight: Flight, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._flight = flight
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Of a client that does not read, sending would wait for ever.
            async with asyncio.timeout(self._flight.seconds_left + 5):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                end = DONE
                try:
                    async for events in self._events:
                        await send({"type": "http.response.body", "body": events, "more_body": True})
                except Exception as error:
                    end = self._error(error)
                await send({"type": "http.response.body", "body": end})
        finally:
            self._flight.close()

    def _error(self, error: Exception) -> bytes:
        """What comes too late for a status."""
        if not isinstance(error, ApiError | VitrailError):  # those are told elsewhere
            log("stream failed", logging.ERROR, request_id=self._flight.id, exc_info=error)
        return event(as_api_error(error).body)


class Answer(Protocol):
    """What is written about the requests of one call."""

    async def whole(self) -> dict[str, Any]:
        """The answer when it is complete."""
        ...

    def events(self) -> AsyncIterator[bytes]:
        """The answer as it comes, as server-sent events."""
        ...


async def answer_call(
    service: Service,
    request: Request,
    kind: type[G],
    submit: Callable[[Service, Flight, G, GenerationConfig], None],
    answer: Callable[[Service, Flight, G], Answer],
) -> Response:
    """Read a call, have `submit` queue what it asks for, on a thread of a pool, and write the `answer`."""
    async with flight_of(service, request) as flight:
        body = await read_body(request, kind)
        watch_client(request, flight)
        service.require_chat(body.model)
        config = body.config()
        service.take_rows(flight, config.n * body.num_prompts)
        await service.run_reading(flight, body.urls, partial(submit, service, flight, body, config))
        written = answer(service, flight, body)
        if body.stream:
            flight.streams = True
            return EventStream(flight, written.events())
        return JsonResponse(await written.whole())


def merged(fresh: list[tuple[int, StreamDelta]]) -> list[tuple[tuple[int, int], StreamDelta]]:
    """What came together, an entry an answer, by the numbers of its prompt and of itself.

    Of a client that reads slowly many tokens are one event.
    """
    found: dict[tuple[int, int], StreamDelta] = {}
    for prompt, delta in fresh:
        before = found.get((prompt, delta.index))
        if before is not None:
            finish = delta.finish_reason or before.finish_reason
            delta = StreamDelta(before.text + delta.text, before.token_ids + delta.token_ids, finish, delta.index)
        found[prompt, delta.index] = delta
    return list(found.items())
