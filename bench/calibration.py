"""What steps of an engine take by their shape, timed from outside: the table of costs that the simulator follows.

    calibration = Calibration(engine)
    calibration.round()  # every shape
    rows = calibration.table()

Medians over everything timed say what the shapes cost beside one another. How fast the machine was is another matter: a
virtual one becomes a third faster or slower within seconds, as its neighbours let it. Whoever compares a table with
something else that was timed therefore times steps all along (`begin`, `go_on`), and asks for the table of that period.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import median
from typing import Any
from uuid import uuid4

import numpy as np

from vitrail.runtime.distributed.costs import causal_pairs
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.processor import Prepared
from vitrail.runtime.engine.scheduler import CHUNK_TOKENS
from vitrail.runtime.engine.sequence import Request
from vitrail.runtime.request import GenerationConfig


@dataclass
class Bench:
    """An engine without caches, and prompts for it that nobody has seen."""

    engine: Engine

    def __post_init__(self) -> None:
        self.draw = np.random.default_rng(0)

    def prepare(self, tokens: int, tiles: int = 0) -> Prepared:
        """A prompt of so many tokens, those of its tiles first."""
        config = self.engine.config
        visual = tiles * config.tokens_per_tile
        text = self.draw.integers(100, 200, tokens - visual).tolist()
        side = config.tile_size
        cut = [self.draw.integers(0, 256, (tiles, side, side, 3), dtype=np.uint8)] if tiles else []
        ids = [self.engine.context_token_id] * visual + text
        return Prepared(ids, [tiles] if tiles else [], visual, cut)

    def submit(self, prepared: Prepared, answer: int) -> Request:
        """Queue a prompt whose answer has so many tokens."""
        config = GenerationConfig(max_new_tokens=answer, ignore_eos=True, temperature=0)
        return self.engine.submit(uuid4().hex, prepared, config)

    def step_ms(self, coming: Sequence[Prepared] = ()) -> float:
        """Milliseconds of the next step, queueing prompts that come before it, with answers of one token, included."""
        start = time.perf_counter()
        for prepared in coming:
            self.submit(prepared, 1)
        self.engine.step()
        return (time.perf_counter() - start) * 1e3

    def fresh_ms(self, prompts: int, tokens: int, tiles: int, *, wait: float = 0.0) -> float:
        """The step that takes so many whole requests, after so many seconds of rest."""
        prepared = [self.prepare(tokens, tiles) for _ in range(prompts)]
        time.sleep(wait)
        return self.step_ms(prepared)

    def decoding(self, rows: int, context: int) -> list[Request]:
        """So many requests that write their answers."""
        requests = [self.submit(self.prepare(context), 200) for _ in range(rows)]
        while not all(request.started for request in requests):
            self.engine.step()
        return requests

    def end(self, requests: Sequence[Request]) -> None:
        """Abort them all."""
        for request in requests:
            self.engine.abort(request.request_id)
        self.engine.step()


ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # small products differ from one number of rows to the next
TILES = ((1, 1), (1, 2), (1, 4), (1, 8), (1, 13), (2, 8), (4, 8))  # of (prompts, tiles of each); 13: a whole image
WAIT_S = 0.2  # after which caches and clock speed are those of a machine at rest
CHUNKS = (64, CHUNK_TOKENS)  # a pass is made for its longest: beside a short one rows may cost less
BESIDE = (*[0] * 6, CHUNKS[0], *[0] * 6, CHUNKS[1])  # steps with so many rows, one after the other
WOKEN = (1, 4)  # tiles of a step after a wait
MANY = 8  # prompts in a pass, to learn what each adds
SHARED = 4  # counts of rows that are timed on the same requests, which end one after the other

Shape = tuple[str | int, ...]


class Calibration:
    """Times steps by their shape, in cycles over all shapes in random order, and makes a table of costs of them.

    `Measured` says what the table's columns mean. periods: what was timed, by shape, since each `begin`.
    """

    def __init__(self, engine: Engine, *, rows: Sequence[int] = ROWS, context: int = 192) -> None:
        self.bench = Bench(engine)
        self.counts, self.context = sorted(rows, reverse=True), context
        self.longest = min(engine.max_model_len - 256, 8192)
        self.far = (max(count for count in rows if count <= 4), self.longest - 32)
        self.lengths = [n for n in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= self.longest]
        # Tiles of one or several prompts: (prompts, tokens of each, tiles of each). Each also without its tiles.
        per_tile = engine.config.tokens_per_tile
        room = engine.scheduler.max_num_batched_tokens
        images = [(many, tiles * per_tile + 8, tiles) for many, tiles in TILES]
        fits = (tokens <= self.longest and many * (tokens + tiles * per_tile) <= room for many, tokens, tiles in images)
        self.images = [image for image, fit in zip(images, fits, strict=True) if fit]
        self.fresh = list(
            {(1, n, 0) for n in self.lengths}
            | {(MANY, 64, 0)}
            | {(*one[:2], k) for one in self.images for k in (0, one[2])}
        )
        self.fresh_after_wait = [(1, 64, 0), *(image for image in self.images if image[0] == 1 and image[2] in WOKEN)]
        self.periods: list[dict[Shape, list[float]]] = []
        self._parts: list[Callable[[], None]] = [
            *(partial(self._time_fresh, shape) for shape in self.fresh),
            *(partial(self._time_after_wait, shape) for shape in self.fresh_after_wait),
            *(partial(self._time_rows, self.counts[n : n + SHARED]) for n in range(0, len(self.counts), SHARED)),
            self._time_far,
            self._time_chunks,
        ]
        self._coming = self._cycles()
        self._owed_ms = 0.0

    # --- timing ---

    def begin(self) -> int:
        """A new period; its number."""
        self.periods.append({})
        return len(self.periods) - 1

    def round(self) -> None:
        """Every shape, in a period of its own. The engine must be idle, as for `go_on`."""
        self.begin()
        for _ in self._parts:
            next(self._coming)()

    def go_on(self, ms: float) -> None:
        """Further shapes for so long, on average: what the last one takes beyond that is taken off the next time."""
        self._owed_ms += ms
        while self._owed_ms > 0:
            start = time.perf_counter()
            next(self._coming)()
            self._owed_ms -= (time.perf_counter() - start) * 1e3

    def _cycles(self) -> Iterator[Callable[[], None]]:
        while True:
            yield from (self._parts[place] for place in self.bench.draw.permutation(len(self._parts)))

    def _note(self, shape: Shape, ms: float) -> None:
        self.periods[-1].setdefault(shape, []).append(ms)

    def _time_fresh(self, shape: tuple[int, int, int]) -> None:
        self._note(shape, self.bench.fresh_ms(*shape))

    def _time_after_wait(self, shape: tuple[int, int, int]) -> None:
        self._time_fresh(shape)  # what it is to be compared with, by the same machine
        self._note(("wait", *shape), self.bench.fresh_ms(*shape, wait=WAIT_S))

    def _time_rows(self, counts: Sequence[int]) -> None:
        """Steps of so many rows each, with and without prompts beside them."""
        rows = self.bench.decoding(counts[0], self.context)
        for count in counts:
            self.bench.end(rows[count:])
            del rows[count:]
            for chunk in BESIDE:
                coming = [self.bench.prepare(chunk)] if chunk else []
                self._note(("beside", count, chunk), self.bench.step_ms(coming))
        self.bench.end(rows)

    def _time_far(self) -> None:
        """Rows with many tokens behind them."""
        requests = self.bench.decoding(*self.far)
        for _ in range(4):
            self._note(("far",), self.bench.step_ms())
        self.bench.end(requests)

    def _time_chunks(self) -> None:
        """A long prompt beside a row: chunk after chunk, each with more tokens before it."""
        row = self.bench.decoding(1, 16)
        self.bench.submit(self.bench.prepare(self._chunks * CHUNK_TOKENS), 1)
        for number in range(self._chunks):
            self._note(("chunk", number), self.bench.step_ms())
        self.bench.end(row)

    # --- the table ---

    @property
    def _chunks(self) -> int:
        """Of a prompt that comes beside one row."""
        return max(1, self.longest // CHUNK_TOKENS)

    def _context_of(self, rows: int) -> float:
        """Tokens of a row, on average, when the steps of so many were timed."""
        return self.context + (len(BESIDE) + 1) * (self.counts.index(rows) % SHARED + 0.5)

    def _medians(self) -> dict[Shape, float]:
        shapes = {shape for period in self.periods for shape in period}
        return {shape: median(chain.from_iterable(one.get(shape, ()) for one in self.periods)) for shape in shapes}

    def table(self, period: int | None = None) -> list[dict[str, Any]]:
        """Rows of a table of costs: of the machine as it was in one period, or in the median of them.

        A period says how much longer than their medians its steps took altogether. What single steps lose to the rest
        of the machine is in that too, spread over all: it is too rare for a mean of each shape.
        """
        medians = self._medians()
        slower = median(
            sum(map(sum, one.values())) / sum(medians[shape] * len(times) for shape, times in one.items())
            for one in (self.periods if period is None else [self.periods[period]])
        )
        return self._rows({shape: slower * value for shape, value in medians.items()})

    def _rows(self, ms: dict[Shape, float]) -> list[dict[str, Any]]:
        """ms: of every shape."""
        first, last = ms["chunk", 0], ms["chunk", self._chunks - 1]
        end = self._chunks * CHUNK_TOKENS
        pairs = causal_pairs(CHUNK_TOKENS, end) - causal_pairs(CHUNK_TOKENS, CHUNK_TOKENS)
        pair = max(0.0, last - first) / pairs if pairs else 0.0
        # Beyond the longest prompt there are passes of several.
        prompts = [(1, n) for n in self.lengths] + [(many, tokens) for many, tokens, _ in self.images if many > 1]
        found: list[dict[str, Any]] = [
            {"stage": "prefill", "tokens": many * tokens, "prompts": many, "ms": ms[many, tokens, 0]}
            for many, tokens in prompts
            if many == 1 or many * tokens > self.lengths[-1]
        ]
        whole = 64 * MANY  # as one prompt, whose pairs are more
        apart = ms[1, whole, 0] - pair * (causal_pairs(whole, whole) - MANY * causal_pairs(64, 64))
        found.append({"stage": "prompt", "ms": max(0.0, ms[MANY, 64, 0] - apart) / (MANY - 1)})
        for many, tokens, tiles in self.images:
            alone = ms[many, tokens, tiles] - ms[many, tokens, 0]
            found.append({"stage": "vision", "tiles": many * tiles, "ms": alone})
        rows, far = self.far
        kv = max(0.0, ms["far",] - ms["beside", rows, 0]) / rows / (far - self._context_of(rows))
        found.append({"stage": "kv", "ms": kv})
        for rows in self.counts:
            longer = kv * rows * (self._context_of(rows) - self.context)
            found.append(
                {"stage": "decode", "rows": rows, "ms": ms["beside", rows, 0] - longer, "context": self.context}
            )
            for chunk in CHUNKS:
                more = max(0.0, ms["beside", rows, chunk] - ms[1, chunk, 0] - longer)
                found.append({"stage": "beside", "tokens": chunk, "rows": rows, "ms": more, "context": self.context})
        found.append({"stage": "pair", "ms": pair})
        found += [
            {"stage": "wake", "tiles": shape[2], "ms": max(0.0, ms["wait", *shape] - ms[shape])}
            for shape in self.fresh_after_wait
        ]
        return found
