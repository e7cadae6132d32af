"""Tiles that wait for a vision half elsewhere, of whatever calls, and the jobs that are made of them."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor

from ..engine.vision_stage import Arrived, Result
from ..errors import VitrailError

# Workers that may end at a tile before it is taken for the reason.
_MAX_DEATHS = 2

_log = logging.getLogger("vitrail")


@dataclass(eq=False)
class Call:
    """Tiles that were asked for together, and what has come of them so far."""

    done: Callable[[Result], None]
    num_tiles: int
    tokens: dict[int, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, index: int, arrived: Arrived) -> None:
        """Take the tokens of one tile; those of the last one end the call."""
        with self.lock:
            self.tokens[index] = arrived.tokens
            if len(self.tokens) < self.num_tiles:
                return
        parts = [self.tokens[place] for place in range(self.num_tiles)]
        self.end(replace(arrived, tokens=parts[0] if len(parts) == 1 else torch.cat(parts)))

    def end(self, result: Result) -> None:
        """Hand over the result, unless an error was handed over before."""
        with self.lock:
            done, self.done = self.done, _nothing
        try:
            done(result)
        except Exception:  # of whoever asked: the other calls need this thread
            _log.exception("a call of the vision half could not be answered")


def _nothing(_: Result) -> None:
    pass


@dataclass(eq=False)
class Tile:
    """One tile that waits for its turn. alone: it shares no job; deaths: of workers that had it."""

    pixels: Tensor
    call: Call
    index: int
    deadline: float = inf
    alone: bool = False
    deaths: int = 0


class TileQueue:
    """The tiles that wait, first come, first served. Whoever has it keeps threads apart."""

    def __init__(self) -> None:
        self._tiles: deque[Tile] = deque()

    def __len__(self) -> int:
        return len(self._tiles)

    def add(self, call: Call, tiles: Tensor, deadline: float = inf) -> None:
        """tiles: (n, tile_size, tile_size, 3)."""
        self._tiles.extend(Tile(pixels, call, index, deadline) for index, pixels in enumerate(tiles))

    def share(self, num_workers: int) -> int:
        """How many of them fall to each of some workers."""
        return -(-len(self._tiles) // num_workers)

    def next_job(self, most: int) -> list[Tile]:
        """The first `most` tiles, or fewer."""
        job = [self._tiles.popleft()]
        while self._tiles and len(job) < most and not job[0].alone and not self._tiles[0].alone:
            job.append(self._tiles.popleft())
        return job

    def put_back(self, tiles: Sequence[Tile], *, alone: bool = False) -> None:
        """The tiles of a job are the first again; alone: each by itself, which shows whose fault it was."""
        for tile in reversed(tiles):
            tile.alone |= alone
            self._tiles.appendleft(tile)

    def put_back_after_death(self, tiles: Sequence[Tile]) -> list[Tile]:
        """As `put_back`, alone, when a worker has ended at them; returns those that have ended too many."""
        for tile in tiles:
            tile.deaths += 1
        self.put_back([tile for tile in tiles if tile.deaths < _MAX_DEATHS], alone=True)
        return [tile for tile in tiles if tile.deaths >= _MAX_DEATHS]

    def clear(self) -> list[Tile]:
        """Give up all that wait; returns them."""
        tiles, self._tiles = [*self._tiles], deque()
        return tiles


def fail(tiles: Iterable[Tile], error: VitrailError) -> None:
    """End the calls that some tiles are of."""
    for tile in tiles:
        tile.call.end(error)
