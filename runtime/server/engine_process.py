"""The engine in a process of its own, so that HTTP and the model do not wait for each other's interpreter.

What callers ask goes over the private channel of `distributed.worker`, and one message a step brings back what is new
of all requests. Here each request is a `RequestRecord` that follows the one in the engine.
"""

import pickle
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import fields
from itertools import count
from queue import SimpleQueue
from time import perf_counter, sleep
from typing import Any, NamedTuple, cast

import torch

from ..api import Runtime
from ..config import InternVLConfig, load_any_config
from ..distributed.worker import Channel, Worker
from ..engine.engine import Engine
from ..engine.processor import Prepared
from ..engine.sequence import Request, RequestRecord, SequenceRecord
from ..errors import VitrailError
from ..image import ImageLimits
from ..layers.parallel import Part
from ..media import MediaPolicy
from ..request import FinishReason, GenerationConfig, StreamDelta, TokenLogprobs
from ..tokenizer import load_tokenizer
from ..weights import make_model, resolve_checkpoint
from .logs import configure
from .settings import Settings

BEAT_S = 0.25  # how often the process says how it is
ANSWER_S = 5.0  # for what is asked of it beside requests
# What a record learns when its request has ended: all that it has not known from the start, or been told of meanwhile.
_KNOWN = {"request_id", "prepared", "config", "sequences", "submitted", "deltas", "loading"}
_OUTCOME = [one.name for one in fields(RequestRecord) if one.name not in _KNOWN]


class Loaded(NamedTuple):
    """What the process says once its model is loaded."""

    context_token_id: int
    max_model_len: int
    max_images: int
    limits: ImageLimits
    media: MediaPolicy
    load_ms: float


class Beat(NamedTuple):
    """How the engine is. loading: the ids of requests whose images are being read."""

    num_steps: int = 0
    reading: bool = False
    broken: bool = False
    failure: VitrailError | None = None
    loading: frozenset[str] = frozenset()


class News(NamedTuple):
    """What is new of a request: deltas as tuples, which are quick to send, and at its end the outcome.

    logprobs: of the tokens of `deltas`, by sequence, if they were asked for.
    """

    request_id: str
    deltas: list[tuple[str, list[int], FinishReason | None, int]]
    logprobs: list[list[TokenLogprobs]]
    outcome: dict[str, Any] | None


def open_runtime(settings: Settings) -> Runtime:
    """The model that settings name: a chat model's engine in a process of its own, any other model in this one."""
    folder = resolve_checkpoint(settings.model, settings.revision)
    config = load_any_config(folder)
    if not isinstance(config, InternVLConfig):
        return Runtime.from_pretrained(settings.model, **settings.runtime_options())
    worker = Worker("the engine's process", run_engine, settings)
    try:
        with torch.device("meta"):
            model = make_model(config, Part(vision=False))
        tokenizer = load_tokenizer(folder)
        loaded: Loaded = worker.ready()
    except BaseException:
        worker.close()
        raise
    return Runtime(
        model,
        tokenizer,
        name=settings.model,
        max_model_len=loaded.max_model_len,
        limit_mm_per_prompt={"image": loaded.max_images},
        image_limits=loaded.limits,
        media=loaded.media,
        load_ms=loaded.load_ms,
        engine=cast(Engine, EngineProcess(worker, loaded.context_token_id)),  # as far as a server calls one
    )


class EngineProcess:
    """What a server calls of an `Engine`, in the process of a worker that is ready. Thread-safe."""

    def __init__(self, worker: Worker, context_token_id: int) -> None:
        self.worker, self.context_token_id = worker, context_token_id
        self.failure: VitrailError | None = None
        self._beat = Beat()
        self._records: dict[str, RequestRecord] = {}
        self._notify: dict[str, Callable[[], None]] = {}
        self._asked: dict[int, Future[Any]] = {}
        self._numbers = count()
        self._lock = threading.Lock()  # of what is asked against the end of the process
        # A large request takes its time to be sent, for which the event loop that aborts another must not wait.
        self._outbox: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, name="vitrail-engine-channel", daemon=True).start()

    def submit(
        self, request_id: str, prepared: Prepared, config: GenerationConfig, preprocess_ms: float = 0.0
    ) -> RequestRecord:
        """`Engine.submit`; the engine's process begins at once."""
        record = RequestRecord(
            request_id=request_id,
            prepared=prepared,
            config=config,
            sequences=[SequenceRecord(index) for index in range(config.n)],
            submitted=perf_counter(),
            preprocess_ms=preprocess_ms,
        )
        self._records[request_id] = record
        try:
            self._ask("submit", request_id, prepared, config, preprocess_ms).result()
        except BaseException:
            self._records.pop(request_id, None)
            raise
        prepared.pictures.clear()  # they are there now
        return record

    def run_in_background(self, record: RequestRecord, notify: Callable[[], None]) -> None:
        """Have `notify` called, on a thread of this object, whenever there is news."""
        self._notify[record.request_id] = notify
        if record.finished is not None:
            self._notify.pop(record.request_id, None)
        notify()  # of what came before

    def abort(self, request_id: str) -> bool:
        """`Engine.abort`."""
        self._outbox.put(("abort", None, request_id))
        return request_id in self._records

    def stats(self) -> dict[str, dict[str, Any]]:
        """`Engine.stats`. Raises `VitrailError` if it does not answer."""
        try:
            return cast(dict[str, dict[str, Any]], self._ask("stats").result(ANSWER_S))
        except TimeoutError:
            raise VitrailError(f"the engine's process did not answer within {ANSWER_S} s") from None

    def close(self) -> None:
        """End the process and every request."""
        self._outbox.put(None)
        self.worker.close()

    @property
    def num_steps(self) -> int:
        """Steps that were taken, as of the last beat."""
        return self._beat.num_steps

    @property
    def reading(self) -> bool:
        """Whether images are being read."""
        return self._beat.reading

    @property
    def broken(self) -> bool:
        """Whether the thread that drives the engine has ended though there is work."""
        return self._beat.broken

    # --- the channel ---

    def _ask(self, what: str, *arguments: object) -> Future[Any]:
        """Send a call; its answer or error comes as the future's."""
        number, future = next(self._numbers), Future[Any]()
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self._asked[number] = future
        self._outbox.put((what, number, *arguments))
        return future

    def _write(self) -> None:
        with suppress(OSError):  # its end is noticed by the thread that reads
            while (message := self._outbox.get()) is not None:
                self.worker.channel.send(message)

    def _read(self) -> None:
        try:
            while True:
                message = self.worker.channel.recv()
                if isinstance(message, Beat):
                    self._hear_beat(message)
                elif isinstance(message, tuple):
                    number, answer = message
                    future = self._asked.pop(number)
                    if isinstance(answer, BaseException):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
                else:
                    self._hear(message)
        except EOFError:
            self._end()

    def _hear_beat(self, beat: Beat) -> None:
        self._beat = beat
        if beat.failure is not None:
            self.failure = beat.failure
        for request_id, record in list(self._records.items()):
            record.loading = request_id in beat.loading or None

    def _hear(self, news: Iterable[News]) -> None:
        for request_id, deltas, logprobs, outcome in news:
            record = self._records.get(request_id)
            if record is None:
                continue  # it was refused
            for index, values in enumerate(logprobs):
                record.sequences[index].logprobs.extend(values)
            for text, token_ids, finish_reason, index in deltas:
                sequence = record.sequences[index]
                sequence.text.append(text)
                sequence.token_ids.extend(token_ids)
                sequence.finish_reason = finish_reason
                # Last: who takes it looks at what was noted before.
                record.deltas.append(StreamDelta(text, token_ids, finish_reason, index))
            notify = self._notify.get(request_id)
            if outcome is not None:
                self._close(record, outcome)
            if notify is not None:
                notify()

    def _close(self, record: RequestRecord, outcome: dict[str, Any]) -> None:
        finished = outcome.pop("finished")
        for name, value in outcome.items():
            setattr(record, name, value)
        record.loading = None
        self._records.pop(record.request_id, None)
        self._notify.pop(record.request_id, None)
        record.finished = finished  # after all that whoever waits for it will look at

    def _end(self) -> None:
        """The process is gone: so are the requests that it had."""
        error = VitrailError("the engine's process was closed")
        if not self.worker.closing:
            error = VitrailError(f"{self.worker.name} {self.worker.describe_end()}")
        with self._lock:
            self.failure = self.failure or error
            asked, self._asked = self._asked, {}
        for future in asked.values():
            future.set_exception(error)
        for record in list(self._records.values()):
            notify = self._notify.get(record.request_id)
            self._close(record, {"error": error, "finished": perf_counter()})
            if notify is not None:
                notify()


# --- in that process ---


def run_engine(channel: Channel, settings: Settings) -> None:
    """What the process runs: load, then do what the server asks for until that ends."""
    configure(settings.log_level)
    runtime = Runtime.from_pretrained(settings.model, **settings.runtime_options())
    engine, processor = runtime.engine, runtime.processor
    loaded = (engine.context_token_id, runtime.max_model_len, processor.max_images)
    channel.send(Loaded(*loaded, runtime.limits, runtime.media, runtime.load_ms))
    _Served(channel, engine).run()


class _Served:
    """An engine and the channel to the server that calls it."""

    def __init__(self, channel: Channel, engine: Engine) -> None:
        self._channel = channel
        self._engine = engine
        self._failure: VitrailError | None = None
        self._requests: dict[str, Request] = {}
        self._telling = threading.Lock()  # news of a request go out in their order

    def run(self) -> None:
        """Do what is asked for. Raises `EOFError` when the server has ended."""
        threading.Thread(target=self._beat, name="vitrail-beat", daemon=True).start()
        calls: dict[str, Callable[..., object]] = {
            "submit": self._submit,
            "stats": self._engine.stats,
            "abort": self._engine.abort,
        }
        while True:
            what, number, *arguments = self._channel.recv()
            answer: object
            try:
                answer = calls[what](*arguments)
            except Exception as error:
                answer = _told(error)
            if number is not None:
                self._channel.send((number, answer))

    def _submit(self, request_id: str, prepared: Prepared, config: GenerationConfig, preprocess_ms: float) -> None:
        request = self._engine.submit(request_id, prepared, config, preprocess_ms)
        self._requests[request_id] = request
        # One function for all of them: an engine calls it once a step.
        self._engine.run_in_background(request, self._tell)

    def _tell(self) -> None:
        """Send what is new of all requests."""
        with self._telling:
            news = [news for request in list(self._requests.values()) if (news := self._news_of(request)) is not None]
            if news:
                with suppress(OSError):  # the server has ended, and this process is about to
                    self._channel.send(news)

    def _news_of(self, request: Request) -> News | None:
        finished = request.finished is not None  # asked before: nothing comes after the end
        deltas, logprobs = [], []
        while request.deltas:
            delta = request.deltas.popleft()
            deltas.append((delta.text, delta.token_ids, delta.finish_reason, delta.index))
        if not deltas and not finished:
            return None
        if request.config.logprobs is not None:
            for sequence in request.sequences:
                logprobs.append(sequence.logprobs)
                sequence.logprobs = []
        outcome = None
        if finished:
            del self._requests[request.request_id]
            outcome = {name: getattr(request, name) for name in _OUTCOME}
            if request.error is not None:
                outcome["error"] = _told(request.error)
                if isinstance(request.error.__cause__, torch.AcceleratorError):
                    self._failure = VitrailError("the device failed")
        return News(request.request_id, deltas, logprobs, outcome)

    def _beat(self) -> None:
        before = Beat()
        with suppress(OSError):
            while True:
                sleep(BEAT_S)
                engine = self._engine
                loading = frozenset(name for name, one in list(self._requests.items()) if one.loading is not None)
                failure = self._failure or engine.failure
                beat = Beat(engine.num_steps, engine.reading, engine.broken, failure, loading)
                if beat != before:
                    self._channel.send(beat)
                    before = beat


def _told(error: BaseException) -> BaseException:
    """An error as it can be sent: with what led to it as a note, since its traceback stays behind."""
    if not isinstance(error, VitrailError) or error.__cause__ is not None:
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:
        return VitrailError(f"{type(error).__name__}: {error}")
    return error
