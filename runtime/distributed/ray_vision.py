"""The vision half as a deployment of Ray Serve of its own, and how the engine of a replica calls it.

Tiles and visual tokens travel as arrays through Ray's object store: memory that processes of one machine share, and
one copy over the network between machines.
"""

import asyncio
import threading
from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np
import torch
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from ..errors import VitrailError

# Tiles in one job at most: enough to fill the matrix products.
TILES_PER_JOB = 16
# Jobs a vision half may have at once: one that runs, one whose tiles are there already.
JOBS_PER_HALF = 2
ATTEMPTS = 2
TIMEOUT_S = 60.0  # for a job, which may have to wait until Ray has replaced a vision half

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

    num_halves: how many there are at the start, for which `capacity` is enough and over which a document's tiles are
    spread. device, dtype: of the tokens.
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
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vitrail-vision", daemon=True)
        self._thread.start()

    def encode(self, tiles: Tensor, done: Callable[[Tensor | VitrailError], None]) -> None:
        """tiles: (n, s, s, 3) uint8, n <= capacity. Calls `done` once, on a thread of its own, with tokens or error."""
        asyncio.run_coroutine_threadsafe(self._all(tiles, done), self._loop)

    def stats(self) -> dict[str, object]:
        """Jobs sent, sent again, and failed since the start."""
        return dict(self._counts)

    def close(self) -> None:
        """End; what is in flight fails. A second time does nothing."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel(self) -> None:
        flying = asyncio.all_tasks() - {asyncio.current_task()}
        for task in flying:
            task.cancel()
        await asyncio.gather(*flying, return_exceptions=True)

    async def _all(self, tiles: Tensor, done: Callable[[Tensor | VitrailError], None]) -> None:
        outcome: Tensor | VitrailError = VitrailError("the vision half was closed")
        try:
            jobs = tiles.split(min(TILES_PER_JOB, ceil(len(tiles) / self._num_halves)))
            parts = await asyncio.gather(*map(self._job, jobs))
            outcome = torch.cat(parts).to(self._device)
        except VitrailError as error:
            outcome = error
        except Exception as error:
            outcome = VitrailError(f"the vision half failed: {error}")
        finally:
            done(outcome)

    async def _job(self, tiles: Tensor) -> Tensor:
        """The visual tokens of a few tiles, on the CPU."""
        attempt = 1
        while True:
            self._counts["jobs"] += 1
            try:
                async with asyncio.timeout(self._timeout_s):
                    found = await self._handle.encode.remote(tiles.numpy())
                return torch.from_numpy(found.copy()).view(self._dtype).squeeze(-1)
            except TimeoutError:
                self._counts["failures"] += 1
                raise VitrailError(f"no vision half answered within {self._timeout_s:g} s") from None
            except (RayError, RayServeException) as error:
                if attempt == ATTEMPTS:
                    self._counts["failures"] += 1
                    reason = str(error).strip().partition("\n")[0]
                    raise VitrailError(f"the vision half failed {ATTEMPTS} times: {reason}") from error
                attempt += 1
                self._counts["retries"] += 1
