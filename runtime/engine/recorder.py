"""Where the time goes: sums by stage that are always kept, and a timeline in Chrome's trace format when asked for."""

import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

# Lanes of the timeline, from top to bottom; others follow in the order they are first heard of.
LANES = ("requests", "preprocessing", "vision half", "language half")


class Recorder:
    """Counts events and sums seconds, by name. Thread-safe: every change is a single step of the interpreter or locked.

    `trace` begins a timeline; without one a span costs two readings of the clock and a sum.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lanes = list(LANES)
        self._events: list[dict[str, Any]] | None = None
        self._lock = threading.Lock()

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count."""
        with self._lock:
            self.counts[name] += number

    def add(self, name: str, lane: str, start: float, end: float, **details: Any) -> None:
        """Note that `name` took from `start` to `end`, in seconds of `perf_counter`, on a lane of the timeline."""
        with self._lock:
            self.seconds[name] += end - start
            self.counts[name] += 1
            if self._events is not None:
                event = {"name": name, "cat": lane, "ph": "X", "ts": start * 1e6, "dur": (end - start) * 1e6}
                if lane not in self._lanes:
                    self._lanes.append(lane)
                self._events.append(event | {"pid": os.getpid(), "tid": self._lanes.index(lane), "args": details})

    @contextmanager
    def span(self, name: str, lane: str, **details: Any) -> Iterator[None]:
        """Note what the block takes."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(name, lane, start, perf_counter(), **details)

    def snapshot(self) -> tuple[dict[str, int], dict[str, float]]:
        """Counts and seconds so far."""
        with self._lock:
            return dict(self.counts), dict(self.seconds)

    def start_trace(self) -> None:
        """Begin a timeline."""
        with self._lock:
            self._events = []

    def write_trace(self, file: str | Path) -> None:
        """End the timeline and write it for chrome://tracing or Perfetto."""
        with self._lock:
            events, self._events = self._events or [], None
        names = [
            {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": number, "args": {"name": lane}}
            for number, lane in enumerate(self._lanes)
        ]
        # Requests overlap: each is a slice of its own, not one above the other.
        flat = [_asynchronous(event) if event["cat"] == "requests" else [event] for event in events]
        body = {"displayTimeUnit": "ms", "traceEvents": names + [event for part in flat for event in part]}
        Path(file).write_text(json.dumps(body), encoding="utf-8")


def _asynchronous(event: dict[str, Any]) -> list[dict[str, Any]]:
    """A begin and an end event of their own track."""
    same = {key: event[key] for key in ("name", "cat", "pid", "tid")} | {"id": event["args"]["request_id"]}
    begin = same | {"ph": "b", "ts": event["ts"], "args": event["args"]}
    return [begin, same | {"ph": "e", "ts": event["ts"] + event["dur"]}]
