"""Between the event loop and the engine: who may come in, how answers come out, and what state the server is in.

One thread of the engine drives for all requests (`Engine.run_in_background`): each thread that ran the model would have
a pool of threads of its own. What a request needs before it is queued runs on bounded pools, never on the event loop.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from functools import partial
from math import ceil
from os import cpu_count
from time import perf_counter
from typing import Any, TypeVar

import torch

from ..api import Runtime
from ..engine.engine import Engine
from ..engine.sequence import Request, RequestRecord
from ..media import MediaPolicy
from ..models.contrastive import ContrastiveModel
from ..models.internvl import InternVLModel
from ..request import StreamDelta
from .errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error
from .logs import log
from .metrics import Metrics
from .settings import Settings

T = TypeVar("T")

WATCH_S = 0.5  # how often the engine's health is looked at
DEATH_GRACE_S = 1.0  # in which a dead server still says so
# Texts of streams that run may wait so long for each other: an event loop that wakes takes the interpreter from the
# thread that runs the model. Fifty times a second look smooth; first and last texts do not wait.
NEWS_S = 0.02
FETCHES = 16  # requests whose media come from elsewhere, at a time


class State(StrEnum):
    """What the server can do. Requests are answered in READY alone."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Flight:
    """One call on its way: the requests it has with the engine, and why it ended if it ended early.

    Belongs to the event loop. `rows` is the number of answers it asks for.
    """

    def __init__(self, service: "Service", request_id: str, *, rows: int = 1) -> None:
        self.id = request_id
        self.rows = rows
        self.requests: list[RequestRecord] = []
        self.streams = False  # whether every delta is news, or the end alone
        self.told = False  # whether there is news that the event loop has not heard of
        self.begun = False  # whether it has heard of any
        self.reason: ApiError | None = None
        self.closed = False
        self.news = asyncio.Event()
        self.over = asyncio.get_running_loop().create_future()  # done when it is aborted
        self.loading_since: float | None = None  # its images are being decoded
        self.watcher: asyncio.Task[None] | None = None  # of its client
        self._service = service
        self._deadline = asyncio.get_running_loop().call_later(service.settings.request_timeout, self._time_out)

    @property
    def finished(self) -> bool:
        """Whether the engine is done with all of it."""
        return all(request.finished is not None for request in self.requests)

    @property
    def seconds_left(self) -> float:
        """Until its deadline."""
        return max(0.0, self._deadline.when() - asyncio.get_running_loop().time())

    def abort(self, reason: ApiError) -> None:
        """End it wherever it is; who waits for it gets `reason`, and the engine takes back what it holds."""
        if self.reason is not None or self.closed:
            return
        self.reason = reason
        self._service.abort(self.requests)
        self.news.set()
        if not self.over.done():
            self.over.set_result(None)

    def close(self) -> None:
        """The caller has been answered, or nobody waits for the answer any more."""
        if self.closed:
            return
        if not self.finished:
            self.abort(ApiError(CLIENT_CLOSED_REQUEST, "the client went away"))
        self.closed = True
        self._deadline.cancel()
        if self.watcher is not None:
            self.watcher.cancel()
        self._service.leave(self)

    def describe(self) -> dict[str, Any]:
        """What the log says of it; what was asked and answered only if the settings say so."""
        if not self.requests:
            return {}
        requests = self.requests
        fields: dict[str, Any] = {
            "prompt_tokens": sum(len(request.prepared.token_ids) for request in requests),
            "tiles": sum(sum(request.prepared.num_tiles) for request in requests),
            "generated_tokens": sum(len(sequence.token_ids) for request in requests for sequence in request.sequences),
            "ttft_ms": round(max(request.metrics.ttft_ms for request in requests), 1),
        }
        if self._service.settings.log_content:
            decode = self._service.runtime.processor.tokenizer.decode
            fields["prompts"] = [decode(request.prepared.token_ids) for request in requests]
            fields["answers"] = [completion.text for request in requests for completion in request.completions]
        return fields

    async def deltas(self) -> AsyncIterator[list[tuple[int, StreamDelta]]]:
        """What is new, with the number of its prompt, whenever something is, until all answers are complete.

        Raises the error of the first request that has one, or why the flight was aborted.
        """
        while True:
            finished = self.finished  # asked before: nothing comes after the end
            fresh: list[tuple[int, StreamDelta]] = []
            for index, request in enumerate(self.requests):
                while request.deltas:
                    fresh.append((index, request.deltas.popleft()))
            if self.reason is not None:
                raise self.reason
            for request in self.requests:
                if request.finished is not None and request.error is not None:
                    raise request.error
            if fresh:
                yield fresh
            if finished:
                return
            await self.news.wait()
            self.news.clear()

    async def wait(self) -> list[RequestRecord]:
        """The requests, complete. Raises as `deltas` does."""
        async for _ in self.deltas():
            pass
        return self.requests

    def _time_out(self) -> None:
        self.abort(ApiError(504, "the request took longer than the server allows", code="timeout"))


class Service:
    """The model behind the server. `load` makes the Runtime, in a thread of its own once `start` is called."""

    def __init__(self, settings: Settings, load: Callable[[], Runtime], metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.state = State.LOADING
        self.failure: BaseException | None = None
        self.flights: set[Flight] = set()
        self.on_end: Callable[[], None] = lambda: None  # called when the process should end
        # Called with what a call asked of the engine.
        self.on_request: list[Callable[[str, list[RequestRecord]], None]] = []
        # Headers are read here; decoding is for the engine's own threads.
        self._pool = ThreadPoolExecutor(min(8, 2 * (cpu_count() or 1)), thread_name_prefix="vitrail-requests")
        self._fetching = ThreadPoolExecutor(FETCHES, thread_name_prefix="vitrail-fetches")
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="vitrail-model")
        metrics.count(calls=lambda: len(self.flights), answers=lambda: self.rows)
        self._load = load
        self._runtime: Runtime | None = None
        self._told: deque[Flight] = deque()
        self._waking = False
        self._pause: asyncio.TimerHandle | None = None  # at whose end the event loop looks for news by itself
        self._duration = 1.0  # of a request, in seconds: a mean that forgets
        self._watch: asyncio.Task[None] | None = None
        self._drain: asyncio.Task[None] | None = None
        self._steps, self._moved = -1, 0.0

    # --- life ---

    async def start(self) -> None:
        """Begin to load."""
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._watch_engine())
        threading.Thread(target=self._load_runtime, name="vitrail-load", daemon=True).start()

    def _load_runtime(self) -> None:
        outcome: Runtime | BaseException
        try:
            outcome = self._load()
        except BaseException as error:
            outcome = error
        self._loop.call_soon_threadsafe(self._loaded, outcome)

    def _loaded(self, outcome: Runtime | BaseException) -> None:
        if isinstance(outcome, BaseException):
            self.failure = outcome
            self.die("the model cannot be loaded")
            return
        self._runtime = outcome
        self.metrics.watch(outcome)
        if self.state is State.LOADING:
            self.state = State.READY
            log("ready", model=self.settings.name, load_ms=round(outcome.load_ms))

    async def stop(self) -> None:
        """Abort what is left and let go of the model, after the last answer."""
        for flight in list(self.flights):
            flight.abort(ApiError(503, "the server is shutting down", code="shutting_down"))
        for task in (self._watch, self._drain):
            if task is not None:
                task.cancel()
        for pool in (self._pool, self._fetching, self._model_thread):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._runtime is not None and self.state is not State.DEAD:
            await asyncio.to_thread(self._runtime.close)

    @property
    def started(self) -> bool:
        return self._watch is not None

    @property
    def loading(self) -> bool:
        return not self.loaded and self.failure is None

    @property
    def loaded(self) -> bool:
        """Whether the model was loaded, whatever has become of it."""
        return self._runtime is not None

    @property
    def dead(self) -> bool:
        return self.state is State.DEAD

    def drain_soon(self) -> None:
        """`drain`, from a signal's handler."""
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Take no more requests, and end when those there are have ended, or have been given time to."""
        if self.state in (State.LOADING, State.READY):
            self.state = State.DRAINING
            log("draining", requests=len(self.flights), timeout_s=self.settings.shutdown_timeout)
            self._drain = self._loop.create_task(self._end_when_empty())

    async def _end_when_empty(self) -> None:
        end = self._loop.time() + self.settings.shutdown_timeout
        while self.flights and self._loop.time() < end:
            await asyncio.sleep(0.02)
        for flight in list(self.flights):
            flight.abort(ApiError(503, "the server is shutting down", code="shutting_down"))
        # The engine ends a request after the step that runs, and answers have to be written.
        end = self._loop.time() + 5
        while self.flights and self._loop.time() < end:
            await asyncio.sleep(0.02)
        self.on_end()

    def die(self, event: str) -> None:
        """Give the engine up: health says so, every request fails, and the process ends soon."""
        if self.state is State.DEAD:
            return
        self.state = State.DEAD
        log(event, logging.CRITICAL, exc_info=self.failure)
        for flight in list(self.flights):
            flight.abort(ApiError(500, "the engine of the server failed", code="engine_dead"))
        self._loop.call_later(DEATH_GRACE_S, lambda: self.on_end())

    async def _watch_engine(self) -> None:
        while self.state is not State.DEAD:
            await asyncio.sleep(WATCH_S)
            if self._runtime is not None and self.chats:
                self._look(self.runtime)

    def _look(self, runtime: Runtime) -> None:
        """One look at the engine, and at the images that are being decoded."""
        now = perf_counter()
        flying = [flight for flight in self.flights if flight.requests and not flight.finished]
        steps = runtime.engine.num_steps
        reading = runtime.engine.reading  # which has a deadline of its own
        if steps != self._steps or not flying or reading:
            self._steps, self._moved = steps, now
        if runtime.engine.failure is not None:  # no request will be answered any more; whoever watches may start anew
            self.failure = runtime.engine.failure
            self.die("the model's processes have ended")
        elif runtime.engine.broken:
            self.die("the engine's thread has ended")
        elif now - self._moved > self.settings.stall_timeout:
            self.die("the engine stands still")
        for flight in flying:
            if not any(request.loading is not None for request in flight.requests):
                flight.loading_since = None
            elif flight.loading_since is None:
                flight.loading_since = now
            elif now - flight.loading_since > self.settings.mm_per_request_timeout:
                flight.abort(ApiError(400, "the media took too long to decode", param="messages", code="media_timeout"))

    # --- what there is ---

    @property
    def runtime(self) -> Runtime:
        """The model. Raises `ApiError` before it is loaded, and after the engine has died."""
        self.check_ready(draining=True)
        assert self._runtime is not None
        return self._runtime

    @property
    def media(self) -> MediaPolicy:
        """What requests may name, and what that may take."""
        settings = self.settings
        return replace(
            self.runtime.media, max_bytes=settings.max_media_bytes, timeout_s=settings.mm_per_request_timeout
        )

    def require_model(self, name: str | None) -> None:
        """Raise `ApiError` for the name of another model."""
        if name is not None and name != self.settings.name:
            message = f"no such model is served here; the one that is: {self.settings.name}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def require_chat(self, name: str | None) -> None:
        """Raise `ApiError` unless a chat model of that name is served."""
        self.require_model(name)
        if not self.chats:
            message = "the model that is served is no chat model: it has /v1/embeddings"
            raise ApiError(400, message, param="model", code="unsupported")

    def require_contrastive(self, name: str | None) -> None:
        """Raise `ApiError` unless a contrastive model of that name is served."""
        self.require_model(name)
        if not self.embeds:
            message = "the model that is served is no contrastive model (InternVL-C/G): it has /v1/chat/completions"
            raise ApiError(400, message, param="model", code="unsupported")

    @property
    def chats(self) -> bool:
        return self._runtime is not None and isinstance(self._runtime.model, InternVLModel)

    @property
    def embeds(self) -> bool:
        return self._runtime is not None and isinstance(self._runtime.model, ContrastiveModel)

    @property
    def rows(self) -> int:
        """Answers asked for by calls that are in flight."""
        return sum(flight.rows for flight in self.flights)

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room."""
        return min(60, max(1, ceil(self._duration)))

    def check_ready(self, *, draining: bool = False) -> None:
        """Raise `ApiError` where no request can be answered; draining: where those inside still can be."""
        if self.state is State.READY or (draining and self.state is State.DRAINING and self._runtime is not None):
            return
        if self.state is State.DEAD:
            raise ApiError(500, "the engine of the server failed", code="engine_dead")
        loading = self.state is State.LOADING
        message = "the model is being loaded" if loading else "the server is shutting down"
        raise ApiError(503, message, code="loading" if loading else "shutting_down", retry_after=5)

    # --- a request ---

    def enter(self, request_id: str) -> Flight:
        """Let a call in. Raises `ApiError`: 503 while loading or draining, 429 where too many wait already."""
        self.check_ready()
        self._check_room(1)
        flight = Flight(self, request_id)
        self.flights.add(flight)
        return flight

    def take_rows(self, flight: Flight, rows: int) -> None:
        """Note how many answers a call asks for, now that it has been read. Raises `ApiError` if they are too many."""
        if self.rows > flight.rows:  # alone it may ask for as many as it likes
            self._check_room(rows - flight.rows)
        flight.rows = rows

    def _check_room(self, more: int) -> None:
        if self.rows + more > self.settings.max_num_seqs + self.settings.max_num_queued_reqs:
            raise ApiError(
                429, "too many requests are waiting already", code="overloaded", retry_after=self.retry_after
            )

    async def run_reading(self, flight: Flight, urls: Iterable[str], work: Callable[[], T]) -> T:
        """`work` that reads `urls`, on a pool and within the time that media have. Raises why the flight was aborted.

        Where others have to be asked for media it is a pool of its own, so that slow ones hold up nobody else.
        """
        pool = self._pool if all(url[:5].lower() == "data:" for url in urls) else self._fetching
        return await self._run(pool, flight, self.settings.mm_per_request_timeout, work)

    async def run_model(self, flight: Flight, work: Callable[[], T]) -> T:
        """`work` that runs the model, one after the other."""
        return await self._run(self._model_thread, flight, None, work)

    async def _run(self, pool: ThreadPoolExecutor, flight: Flight, timeout: float | None, work: Callable[[], T]) -> T:
        if flight.reason is not None:
            raise flight.reason
        submitted: Future[T] = pool.submit(work)
        future = asyncio.wrap_future(submitted)
        await asyncio.wait({future, flight.over}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody waits for it any more
            submitted.cancel()
            flight.abort(ApiError(400, "the media took too long to fetch or to read", code="media_timeout"))
        if flight.reason is not None:
            raise flight.reason
        return future.result()

    def launch(self, flight: Flight, request: Request) -> None:
        """Have the engine drive for a request that was queued. On any thread."""
        flight.requests.append(request)
        self._engine().run_in_background(request, partial(self._tell, flight))
        if flight.reason is not None:  # meanwhile, when there was nothing to abort yet
            self.abort([request])

    def abort(self, requests: list[RequestRecord]) -> None:
        """End requests; the engine takes back what they hold after the step that runs."""
        if self._runtime is not None and self.chats:
            for request in requests:
                self._runtime.abort(request.request_id)

    def leave(self, flight: Flight) -> None:
        """A flight is closed: it counts until the engine is done with it."""
        if flight.closed and (flight.finished or self.state is State.DEAD) and flight in self.flights:
            self.flights.discard(flight)
            self.metrics.observe(flight.requests)
            for tell in self.on_request:
                tell(flight.id, flight.requests)
            for request in flight.requests:
                self._duration += 0.1 * (request.metrics.e2e_ms / 1e3 - self._duration)
                if request.error is not None:
                    self._look_into(flight, request.error)

    def _look_into(self, flight: Flight, error: BaseException) -> None:
        """Log an error that was not the caller's; one of the device is the engine's end."""
        if as_api_error(Exception() if not isinstance(error, Exception) else error).status < 500:
            return
        log("request failed", logging.ERROR, request_id=flight.id, exc_info=error)
        if isinstance(error.__cause__, torch.AcceleratorError):
            self.failure = error.__cause__
            self.die("the device failed")

    def _engine(self) -> Engine:
        assert self._runtime is not None
        return self._runtime.engine

    def _tell(self, flight: Flight) -> None:
        """Called by the engine, after a step, for every request of the flight that has news."""
        finished = flight.finished
        if not flight.streams and not finished:
            return
        if not flight.told:
            flight.told = True
            self._told.append(flight)
        if (finished or not flight.begun or self._pause is None) and not self._waking:
            self._waking = True
            with suppress(RuntimeError):  # the event loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        self._waking = False  # before it is read: what comes after may be missed here
        while self._told:
            flight = self._told.popleft()
            flight.told = False  # likewise
            flight.begun = True
            flight.news.set()
            self.leave(flight)
        if self._pause is None:
            self._pause = self._loop.call_later(NEWS_S, self._end_pause)

    def _end_pause(self) -> None:
        self._pause = None  # before it is looked at, likewise
        if self._told:
            self._hear()
