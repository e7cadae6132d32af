"""The vision half of a step: tiles of several requests to visual tokens, and where those are until they are read."""

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from .batch import Tiles
from .recorder import Recorder
from .runner import Encoded, Runner
from .sequence import Request
from .vision_cache import VisionCache


class VisionStage:
    """Encodes tiles and keeps their tokens with their requests, and in `cache` for later ones."""

    def __init__(self, runner: Runner, cache: VisionCache, recorder: Recorder) -> None:
        self._runner = runner
        self._cache = cache
        self._recorder = recorder

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
            held = part.request.visual.setdefault(part.place, [])
            if part.first == 0:
                held.clear()
            held.append(replace(encoded, tokens=tokens))
        for request in {part.request: None for part in parts}:
            request.transfer_ms += (stacked - start) * 1e3
            request.projector_ms += encoded.projector_ms

    def tokens(self, request: Request, start: int, end: int) -> list[tuple[int, Tensor]]:
        """Visual tokens at positions start .. end of a prompt, each stretch with its place among them."""
        stretches = []
        for place, image in enumerate(request.images):
            first, last = max(image.start, start), min(image.end, end)
            if first >= last:
                continue
            if place not in request.visual:  # from the cache
                kept = request.loaded[place].tokens.to(self._runner.device, self._runner.dtype, non_blocking=True)
                request.visual[place] = [Encoded(kept, 0.0, 0.0)]
            held = request.visual[place]
            tokens = held[0].tokens if len(held) == 1 else torch.cat([part.tokens for part in held])
            stretches.append((first - start, tokens[first - image.start : last - image.start]))
        return stretches

    def keep(self, request: Request) -> None:
        """After the prompt: its visual tokens leave the device, for the cache if that has room."""
        passes = {id(part.began): part for held in request.visual.values() for part in held}
        request.vision_ms += sum(part.elapsed_ms for part in passes.values())
        for place, held in request.visual.items():
            image, loaded = request.images[place], request.loaded[place]
            if image.kept or not image.key or not self._cache.max_bytes:
                continue
            tokens = torch.cat([part.tokens for part in held]).cpu()
            if self._cache.put(image.key, tokens, tokens.nbytes):
                loaded.tiles, loaded.tokens, image.kept = None, tokens, True
        request.visual.clear()


def _tiles_of(part: Tiles[Request]) -> Tensor:
    tiles = part.request.loaded[part.place].tiles
    assert tiles is not None
    return torch.from_numpy(tiles[part.first : part.first + part.count])
