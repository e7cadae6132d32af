"""Requests under load without a server: one thread takes the engine's steps, as a server's thread does."""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.sequence import Request
from vitrail.runtime.request import StreamDelta

POISSON_LOAD = 0.7  # of what a closed loop managed


@dataclass
class Stream:
    """When a request arrived, and its deltas with the times they came at, in seconds."""

    arrived: float
    deltas: list[tuple[float, StreamDelta]] = field(default_factory=list)


def arrivals(count: int, rate: float | None) -> list[float]:
    """Times of `count` requests, so many a second at random, the same in every run; all zero without a rate."""
    generator = random.Random(0)
    return list(accumulate(0.0 if rate is None else generator.expovariate(rate) for _ in range(count)))


def drive(
    engine: Engine,
    submits: Sequence[Callable[[], Request]],
    *,
    clients: int | None = None,
    rate: float | None = None,
) -> list[Stream]:
    """All requests, each queued by its `submit`, streamed to their ends. Raises a request's own error.

    clients: so many at a time, one begins where another ends. rate: they arrive at random, so many a second.
    """
    start = time.perf_counter()
    coming = deque(zip(submits, (start + offset for offset in arrivals(len(submits), rate)), strict=True))
    streams: list[Stream] = []
    running: list[tuple[Request, Stream]] = []
    while coming or running:
        now = time.perf_counter()
        if coming and not running and coming[0][1] > now:
            time.sleep(coming[0][1] - now)
        while coming and (len(running) < clients if clients is not None else coming[0][1] <= time.perf_counter()):
            submit, arrival = coming.popleft()
            streams.append(Stream(time.perf_counter() if rate is None else arrival))
            running.append((submit(), streams[-1]))
        engine.step()
        now = time.perf_counter()
        for request, stream in running:
            while request.deltas:
                stream.deltas.append((now, request.deltas.popleft()))
            if request.error is not None:
                raise request.error
        running = [(request, stream) for request, stream in running if request.finished is None]
    return streams
