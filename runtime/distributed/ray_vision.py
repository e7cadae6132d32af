"""The vision half as a deployment of Ray Serve of its own, and how the engine of a replica calls it.

Tiles and visual tokens travel as arrays through Ray's object store: memory that processes of one machine share, and
one copy over the network between machines. Tiles of several requests that wait are encoded together.
"""

import asyncio
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from ..engine.vision_stage import Arrived, Result
from ..errors import VitrailError
from .tile_jobs import Call, Tile, TileQueue, fail

# Tiles in one job at most: enough to fill the matrix products.
TILES_PER_JOB = 16
# Jobs a vision half may have at once: one that runs, one whose tiles are there already.
JOBS_PER_HALF = 2
TIMEOUT_S = 60.0  # for a tile, which may have to wait until Ray has replaced a vision half
_CLOSED = "the vision half is closed"

Encode = Callable[[Tensor], Tensor]


class VisionHalf:
    """Tiles in, visual tokens out. load: makes what encodes (n, s, s, 3) uint8 to (n * tokens per tile, hidden)."""

    def __init__(self, load: Callable[[], Encode], threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._encode = load()
        self._running = threading.Lock()

    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """tiles: (n, s, s, 3) uint8. Returns (n * tokens, hidden, size) uint8, each number as its bytes."""
        with self._running, torch.inference_mode():  # Ray Serve calls from several threads
            tokens = self._encode(torch.from_numpy(tiles.copy()))
        return tokens.cpu().contiguous().unsqueeze(-1).view(torch.uint8).numpy()  # NumPy has no bfloat16


class RayVision:
    """`VisionWorkers` (engine/vision_stage.py) over the handle of `VisionHalf`s.

    num_halves: how many there are at the start, for which `capacity` is enough. Tiles that come while they have all the
    jobs they may have wait, and are joined. device, dtype: of the tokens.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        num_halves: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.capacity = num_halves * JOBS_PER_HALF * TILES_PER_JOB
        self._handle = handle
        self._num_halves = num_halves
        self._device, self._dtype = device, dtype
        self._timeout_s = timeout_s
        self._counts = {"jobs": 0, "retries": 0, "failures": 0}
        self._lock = threading.Lock()
        self._closed = False
        self._queue = TileQueue()
        self._jobs: dict[asyncio.Task[None], list[Tile]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vitrail-vision", daemon=True)
        self._thread.start()

    def encode(self, tiles: Tensor, done: Callable[[Result], None]) -> None:
        """tiles: (n, s, s, 3) uint8, n <= capacity. Calls `done` once, on a thread of its own, with tokens or error."""
        call = Call(done, len(tiles))
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._add, call, tiles)
                return
        call.end(VitrailError(_CLOSED))

    def stats(self) -> dict[str, object]:
        """Jobs sent, those whose tiles were sent again, and those that failed since the start."""
        return dict(self._counts)

    def close(self) -> None:
        """End; what is in flight fails. A second time does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- on the thread of the loop ---

    async def _cancel(self) -> None:
        fail(self._queue.clear(), VitrailError(_CLOSED))
        for task in self._jobs:
            task.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    def _add(self, call: Call, tiles: Tensor) -> None:
        self._queue.add(call, tiles, self._loop.time() + self._timeout_s)
        self._dispatch()

    def _dispatch(self) -> None:
        share = min(TILES_PER_JOB, self._queue.share(self._num_halves))
        while len(self._queue) and len(self._jobs) < self._num_halves * JOBS_PER_HALF:
            job = self._queue.next_job(share)
            task = self._loop.create_task(self._run(job))
            self._jobs[task] = job
            task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        job = self._jobs.pop(task)
        if task.cancelled():  # perhaps before it began
            fail(job, VitrailError(_CLOSED))
        self._dispatch()

    async def _run(self, job: list[Tile]) -> None:
        """Have a vision half encode the tiles of a job, and tell those who wait for them."""
        self._counts["jobs"] += 1
        failed = job
        try:
            parts = await self._encoded(job)
            for tile, part in zip(job, parts, strict=True):
                tile.call.put(tile.index, part)
            return
        except TimeoutError:
            error = VitrailError(f"no vision half answered within {self._timeout_s:g} s")
        except (RayError, RayServeException) as reason:
            error = VitrailError(f"the vision half failed: {str(reason).strip().partition(chr(10))[0]}")
            if not isinstance(reason, RayTaskError):
                failed = self._queue.put_back_after_death(job)
            elif len(job) > 1:  # what the half itself raised
                self._queue.put_back(job, alone=True)
                failed = []
        except Exception as reason:
            error = VitrailError(f"the vision half failed: {reason}")
        self._counts["failures" if failed else "retries"] += 1
        fail(failed, error)

    async def _encoded(self, job: list[Tile]) -> list[Arrived]:
        began = perf_counter()
        tiles = torch.stack([tile.pixels for tile in job]).numpy()
        async with asyncio.timeout_at(max(tile.deadline for tile in job)):
            found = await self._handle.encode.remote(tiles)
        tokens = torch.from_numpy(found.copy()).view(self._dtype).squeeze(-1).to(self._device)
        ended = perf_counter()
        parts = tokens.split(len(tokens) // len(job))
        return [Arrived(part, began, ended, num_tiles=len(job)) for part in parts]
