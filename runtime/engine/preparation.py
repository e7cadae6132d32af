"""Images ahead of their turn: a bounded pool of threads makes tiles of them while the model runs."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from time import perf_counter

from ..errors import InvalidRequestError
from ..request import GenerationConfig
from .processor import Picture, Prepared, Processor, image_name
from .recorder import Recorder
from .sequence import Request
from .vision_cache import LoadedImage, VisionCache

# Tiles that wait for their turn or are being made: 77 MB at 448 pixels.
TILES_AHEAD = 128


class Preparation:
    """Loads the images of requests in the order they came, as many as may wait.

    report: called on any thread when a request's `loading` is over. cache: None where keys of images are of no use.
    """

    def __init__(
        self,
        processor: Processor,
        cache: VisionCache | None,
        recorder: Recorder,
        domain: Callable[[GenerationConfig], bytes],
        report: Callable[[Request], None],
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.loading: set[Request] = set()
        self._processor = processor
        self._cache = cache
        self._recorder = recorder
        self._domain = domain
        self._report = report
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="vitrail-images")

    def load(self, prepared: Prepared, config: GenerationConfig, *, spread: bool = True) -> list[LoadedImage]:
        """Make tiles of a prompt's pictures, or find what they became once. Raises for one that cannot be read.

        spread: several pictures over the threads of the pool, on which this must not run itself then.
        """
        load = partial(self._load_one, domain=self._domain(config))
        places = range(len(prepared.pictures))
        over = self._pool.map if spread and len(places) > 1 else map
        return list(over(load, places, prepared.pictures, prepared.num_tiles))

    def go_on(self, others: Iterable[Request]) -> None:
        """Begin with further requests, if with `others`, whose tiles wait already, they hold no more than allowed."""
        if not self.waiting:
            return
        ahead = [*self.loading, *others]
        num_tiles = sum(sum(request.prepared.num_tiles) for request in ahead)
        while self.waiting:
            request = self.waiting[0]
            num_tiles += sum(request.prepared.num_tiles)
            if num_tiles > TILES_AHEAD and ahead:
                return
            ahead.append(self.waiting.popleft())
            self.loading.add(request)
            request.ahead = True
            request.loading = self._pool.submit(self._load, request)
            request.loading.add_done_callback(partial(self._done, request))

    def drop(self, request: Request) -> None:
        """Do without a request, wherever it is."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request.loading is not None and request.loading.cancel():
            self.loading.discard(request)

    def close(self) -> None:
        """Begin with nothing any more; what runs comes to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, request: Request) -> list[LoadedImage]:
        start = perf_counter()
        try:
            return self.load(request.prepared, request.config, spread=False)
        finally:
            request.preprocess_ms += (perf_counter() - start) * 1e3

    def _done(self, request: Request, _: Future[list[LoadedImage]]) -> None:
        self._report(request)

    def _load_one(self, index: int, picture: Picture, num_tiles: int, *, domain: bytes) -> LoadedImage:
        image = self._processor.load(picture, name=image_name(index), cache=self._cache, domain=domain)
        end = perf_counter()
        if image.tiles is not None:
            if len(image.tiles) != num_tiles:
                raise InvalidRequestError(f"{image_name(index)} changed while it was read")
            cut = end - image.tile_ms / 1e3
            self._recorder.add("image decode", "preprocessing", cut - image.decode_ms / 1e3, cut)
            self._recorder.add("tile", "preprocessing", cut, end, tiles=num_tiles)
        return image
