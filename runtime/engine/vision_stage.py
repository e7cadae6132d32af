"""The vision half of a step: tiles of several requests to visual tokens, and where those are until they are read.

It runs on the device of the language half, or on workers that have devices of their own and answer when they are done.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from ..errors import VitrailError
from .batch import Tiles
from .recorder import Recorder
from .runner import Encoded, Runner
from .sequence import Request
from .vision_cache import VisionCache


@dataclass
class Arrived(Encoded):
    """Visual tokens from a worker. lane: its line of the timeline; num_tiles: of the pass that they come from.

    Tokens of one pass have the same object as `began`, and come one after the other.
    """

    lane: str = "vision half"
    num_tiles: int = 1


# What comes back from a worker, and who is told.
Result = Tensor | Arrived | VitrailError
Report = Callable[[Tiles[Request], Arrived | VitrailError], None]


class VisionWorkers(Protocol):
    """Devices that the vision half has to itself. `capacity`: tiles that may be in flight at once."""

    capacity: int

    def encode(self, tiles: Tensor, done: Callable[[Result], None]) -> None:
        """tiles: (n, tile_size, tile_size, 3) uint8 on the CPU. Does not block unless more are in flight than may be.

        `done` is called once, on any thread, with the tokens (n * tokens_per_tile, llm hidden), on the device and of
        the dtype of the language half, or with what went wrong.
        """

    def stats(self) -> dict[str, object]:
        """What there is to know of them, in plain types."""

    def close(self) -> None:
        """End them."""


class VisionStage:
    """Encodes tiles and keeps their tokens with their requests, and in `cache` for later ones."""

    def __init__(
        self, runner: Runner, cache: VisionCache, recorder: Recorder, workers: VisionWorkers | None = None
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._recorder = recorder
        self._workers = workers
        self._last_pass: dict[str, object] = {}  # by lane

    # --- on the device of the language half ---

    def run(self, parts: list[Tiles[Request]], fail: Callable[[Request, Exception], None]) -> None:
        """Encode all `parts` together, or by request if that fails, to `fail` those whose tiles it was."""
        try:
            self._encode(parts)
        except Exception:
            for request in {part.request: None for part in parts}:
                try:
                    self._encode([part for part in parts if part.request is request])
                except Exception as error:
                    fail(request, error)

    def _encode(self, parts: list[Tiles[Request]]) -> None:
        start = perf_counter()
        tiles = torch.cat([_tiles_of(part) for part in parts])
        stacked = perf_counter()
        encoded = self._runner.encode_beside(tiles)
        end = perf_counter()
        self._recorder.add("transfer", "vision half", start, stacked)
        self._recorder.add("vision", "vision half", stacked, end, tiles=len(tiles), requests=len(parts))
        if encoded.projector_ms:
            self._recorder.add("projector", "vision half", end - encoded.projector_ms / 1e3, end)
        self._recorder.count("tiles encoded", len(tiles))
        per_tile = len(encoded.tokens) // len(tiles)
        tokens_of = encoded.tokens.split([part.count * per_tile for part in parts])
        for part, tokens in zip(parts, tokens_of, strict=True):
            held = part.request.visual.setdefault(part.place, {})
            if part.first == 0:
                held.clear()
            held[part.first] = replace(encoded, tokens=tokens)
        for request in {part.request: None for part in parts}:
            request.transfer_ms += (stacked - start) * 1e3

    # --- on workers ---

    def send(self, parts: list[Tiles[Request]], report: Report) -> None:
        """Give tiles to the workers. `report` is called for each of `parts`, on any thread, when it comes back."""
        assert self._workers is not None
        for part in parts:
            start = perf_counter()
            done = partial(_report, report, part, start)
            try:
                self._workers.encode(_tiles_of(part), done)
            except Exception as error:
                done(error if isinstance(error, VitrailError) else VitrailError(f"vision workers: {error}"))
            end = perf_counter()
            part.request.transfer_ms += (end - start) * 1e3
            self._recorder.add("transfer", "vision half", start, end)

    def take(self, part: Tiles[Request], arrived: Arrived) -> None:
        """Keep tokens that came back with the request that waits for them."""
        image = part.request.images[part.place]
        if len(arrived.tokens) != part.count * image.tokens_per_tile:
            wrong = f"{len(arrived.tokens)} visual tokens came back for {part.count} x {image.tokens_per_tile}"
            raise VitrailError(f"vision workers: {wrong}")
        if self._last_pass.get(arrived.lane) is not arrived.began:
            self._last_pass[arrived.lane] = arrived.began
            end = float(arrived.ended)  # type: ignore[arg-type]  # no events: another process had them
            self._recorder.add("vision", arrived.lane, end - arrived.elapsed_ms / 1e3, end, tiles=arrived.num_tiles)
            if arrived.projector_ms:
                self._recorder.add("projector", arrived.lane, end - arrived.projector_ms / 1e3, end)
        self._recorder.count("tiles encoded", part.count)
        # Workers of several engines give all of them tokens on one device.
        tokens = arrived.tokens.to(self._runner.device, self._runner.dtype)
        part.request.visual.setdefault(part.place, {})[part.first] = replace(arrived, tokens=tokens)

    def encode(self, tiles: Tensor) -> Tensor:
        """Visual tokens (n * tokens_per_tile, llm hidden) of tiles of no request. On any thread; waits for them."""
        if self._workers is None:
            return self._runner.model.encode_tiles(tiles.to(self._runner.device)).flatten(0, 1)
        found = []
        for part in tiles.split(self._workers.capacity):
            future: Future[Result] = Future()
            self._workers.encode(part, future.set_result)
            result = future.result()
            if isinstance(result, VitrailError):
                raise result
            found.append(result if isinstance(result, Tensor) else result.tokens)
        return torch.cat(found)

    # --- until they are read ---

    def tokens(self, request: Request, start: int, end: int) -> list[tuple[int, Tensor]]:
        """Visual tokens at positions start .. end of a prompt, each stretch with its place among them."""
        stretches = []
        for place, image in enumerate(request.images):
            first, last = max(image.start, start), min(image.end, end)
            if first >= last:
                continue
            if place not in request.visual:  # from the cache
                kept = request.loaded[place].tokens.to(self._runner.device, self._runner.dtype, non_blocking=True)
                request.visual[place] = {0: Encoded(kept, 0.0, 0.0)}
            self._runner.await_encoded()  # before they are joined, which reads them
            tokens = _joined(request.visual[place])
            stretches.append((first - start, tokens[first - image.start : last - image.start]))
        return stretches

    def keep(self, request: Request) -> None:
        """After the prompt: its visual tokens leave the device, for the cache if that has room."""
        passes = {id(part.began): part for held in request.visual.values() for part in held.values()}
        request.vision_ms += sum(part.elapsed_ms for part in passes.values())
        request.projector_ms += sum(part.projector_ms for part in passes.values())
        for place, held in request.visual.items():
            image, loaded = request.images[place], request.loaded[place]
            if image.kept or not image.key or not self._cache.max_bytes:
                continue
            if sum(len(part.tokens) for part in held.values()) < image.num_tokens:
                continue  # the prefix was found in the cache before the image had been encoded as a whole
            tokens = _joined(held).cpu()
            if tokens.untyped_storage().nbytes() > tokens.nbytes:  # a part of what others were encoded with
                tokens = tokens.clone()
            if self._cache.put(image.key, tokens, tokens.nbytes):
                loaded.tiles, loaded.tokens, image.kept = None, tokens, True
        request.visual.clear()


def _report(report: Report, part: Tiles[Request], sent: float, result: Result) -> None:
    if isinstance(result, Tensor):  # from a worker that does not say how long it took
        result = Arrived(result, sent, perf_counter())
    report(part, result)


def _joined(held: dict[int, Encoded]) -> Tensor:
    """Tokens of one image in the order of its tiles."""
    tokens = [held[first].tokens for first in sorted(held)]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def _tiles_of(part: Tiles[Request]) -> Tensor:
    tiles = part.request.loaded[part.place].tiles
    assert tiles is not None
    return torch.from_numpy(tiles[part.first : part.first + part.count])
