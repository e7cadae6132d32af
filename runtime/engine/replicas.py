"""Several engines of one model behind the calls of one: each has devices of its own, all share the visual tokens.

A request goes to the engine with the fewest of them, unless the one that last had its first image, whose keys and
values may still be there, is hardly busier. Each engine is driven by a thread of its own.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import InvalidRequestError, VitrailError
from ..request import GenerationConfig, StreamDelta
from .engine import Engine
from .processor import Prepared
from .sequence import Request
from .vision_cache import LoadedImage, source_digest
from .vision_stage import VisionStage

# Requests by which the engine that knows an image may be busier than the others and still be chosen.
_PATIENCE = 2
# Images of which it is remembered where they went last.
_MAX_PLACES = 4096


class Replicas:
    """Called as one `Engine` is. The engines share their `vision_cache` and their `recorder`."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        first = self.engines[0]
        self.config, self.context_token_id, self.device = first.config, first.context_token_id, first.device
        self.recorder, self.vision_cache = first.recorder, first.vision_cache
        self.max_num_seqs = sum(engine.max_num_seqs for engine in engines)
        self._homes: WeakKeyDictionary[Request, Engine] = WeakKeyDictionary()
        self._places: OrderedDict[bytes, Engine] = OrderedDict()
        self._lock = threading.Lock()

    def submit(
        self,
        request_id: str,
        prepared: Prepared,
        config: GenerationConfig,
        preprocess_ms: float = 0.0,
        loaded: list[LoadedImage] | None = None,
    ) -> Request:
        """`Engine.submit` of the one that is chosen."""
        image = _first_image(prepared, loaded)
        with self._lock:  # so that the next one counts this one
            if any(engine.has(request_id) for engine in self.engines):
                raise InvalidRequestError(f"request id {request_id!r} is in use")
            engine = self._choose(image)
            request = engine.submit(request_id, prepared, config, preprocess_ms, loaded)
            self._homes[request] = engine
            engine.run_in_background(request, _nobody)  # also while its caller waits for one of another engine
            if image is not None:
                self._places[image] = engine
                self._places.move_to_end(image)
                if len(self._places) > _MAX_PLACES:
                    self._places.popitem(last=False)
        return request

    def load(self, prepared: Prepared, config: GenerationConfig) -> list[LoadedImage]:
        """`Engine.load`: there is one cache for all."""
        return self.engines[0].load(prepared, config)

    def stream(self, request: Request) -> Iterator[StreamDelta]:
        """`Engine.stream`."""
        return self._homes[request].stream(request)

    def run_in_background(self, request: Request, notify: Callable[[], None]) -> None:
        """`Engine.run_in_background`."""
        self._homes[request].run_in_background(request, notify)

    def abort(self, request_id: str) -> bool:
        """`Engine.abort`."""
        return any(engine.abort(request_id) for engine in self.engines)

    def close(self) -> None:
        """Close all of them."""
        for engine in self.engines:
            engine.close()

    def stats(self) -> dict[str, dict[str, Any]]:
        """`Engine.stats` of all together: what is counted is common, what is there now is added up."""
        whole, *others = (engine.stats() for engine in self.engines)
        for part, names in (
            ("requests", ("waiting", "preprocessing", "running")),
            ("kv_cache", ("blocks", "used", "idle", "evicted")),
        ):
            for name in names:
                whole[part][name] += sum(other[part][name] for other in others)
        return whole

    @property
    def num_steps(self) -> int:
        """Steps that were taken by all of them."""
        return self.recorder.counts["steps"]

    @property
    def reading(self) -> bool:
        """Whether images are being read."""
        return any(engine.reading for engine in self.engines)

    @property
    def broken(self) -> bool:
        """Whether one of the threads that drive has ended though there is work."""
        return any(engine.broken for engine in self.engines)

    @property
    def vision_stage(self) -> VisionStage:
        """What encodes tiles of no request."""
        return self.engines[0].vision_stage

    @property
    def failure(self) -> VitrailError | None:
        """Why none of them can answer any more."""
        failures = [engine.failure for engine in self.engines]
        return failures[0] if all(failures) else None

    def _choose(self, image: bytes | None) -> Engine:
        able = [engine for engine in self.engines if engine.failure is None] or self.engines
        fewest = min(able, key=lambda engine: engine.num_requests)
        known = None if image is None else self._places.get(image)
        if known is not None and known in able and known.num_requests <= fewest.num_requests + _PATIENCE:
            return known
        return fewest


def _nobody() -> None:
    """Is told the news of a request until somebody waits for it."""


def _first_image(prepared: Prepared, loaded: list[LoadedImage] | None) -> bytes | None:
    """What tells the first image of a request from others, where that is known or cheap to know."""
    if loaded:
        return loaded[0].key or None
    return source_digest(prepared.pictures[0].source) if prepared.pictures else None
