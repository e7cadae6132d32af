"""A vision half that was exported: what its runners have in common, and what the engine knows of them."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from ..errors import InvalidRequestError
from .manifest import Part


class VisionSession(ABC):
    """Tiles to visual tokens by an exported vision half. Not for several threads at once.

    device: where it computes; tiles may come from elsewhere, tokens are there. dtype: of the tokens. max_tiles: of one
    call of `_run`; more are cut into several. Use it as a context manager, or `close` it.
    """

    device: torch.device
    max_tiles: int

    def __init__(self, part: Part) -> None:
        self.part = part
        _, height, width, _ = part.inputs[0].shape
        self.tile_shape = (int(height), int(width), 3)
        self.tokens_per_tile, self.hidden_size = (int(size) for size in part.outputs[0].shape[1:])
        self.dtype: torch.dtype = getattr(torch, part.outputs[0].dtype)
        self._closed = False

    def encode(self, tiles: Tensor) -> Tensor:
        """tiles: (n, tile, tile, 3) uint8. Returns (n, tokens_per_tile, llm hidden) on `device`."""
        if self._closed:
            raise InvalidRequestError("this session is closed")
        if tiles.dtype != torch.uint8 or tuple(tiles.shape[1:]) != self.tile_shape:
            expected = ", ".join(map(str, self.tile_shape))
            raise InvalidRequestError(
                f"an exported vision half takes uint8 tiles (n, {expected}), not {tiles.dtype} {tuple(tiles.shape)}"
            )
        parts = [self._run(part.to(self.device).contiguous()) for part in tiles.split(self.max_tiles)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @abstractmethod
    def _run(self, tiles: Tensor) -> Tensor:
        """`encode` of 1 to max_tiles contiguous tiles on `device`; the tokens are the caller's to keep."""

    def close(self) -> None:
        """Let go of the file and its memory. Later calls raise `InvalidRequestError`."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
