"""Pixel shuffle, the projector's token compression, with the LayerNorm that follows it.

v2: out[i, j, s * D + c] = in[k*i + s // k, k*j + s % k, c]: the k*k neighbours of a square become channel blocks in
row-major order. v1 is v2 with the two spatial axes of the result swapped.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

PixelShuffleVersion = Literal["v1", "v2"]


def pixel_shuffle(x: Tensor, factor: int, version: PixelShuffleVersion) -> Tensor:
    """x: (tiles, side * side, D) patch tokens, row-major. Returns (tiles, (side / factor)^2, factor^2 * D)."""
    _check_square(x.shape[1], factor)
    return pixel_shuffle_reference(x, factor, version)


def pixel_shuffle_reference(x: Tensor, factor: int, version: PixelShuffleVersion) -> Tensor:
    tiles, tokens, channels = x.shape
    side = int(tokens**0.5) // factor
    squares = x.reshape(tiles, side, factor, side, factor, channels)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return squares.permute(order).reshape(tiles, side * side, factor * factor * channels)


def pixel_shuffle_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: int, version: PixelShuffleVersion
) -> Tensor:
    """LayerNorm(pixel_shuffle(x)). weight, bias: (factor^2 * D,). Shapes as in `pixel_shuffle`."""
    _check_square(x.shape[1], factor)
    return pixel_shuffle_norm_reference(x, weight, bias, eps, factor, version)


def pixel_shuffle_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: int, version: PixelShuffleVersion
) -> Tensor:
    shuffled = pixel_shuffle_reference(x, factor, version)
    return F.layer_norm(shuffled, (shuffled.shape[-1],), weight, bias, eps)


def _check_square(tokens: int, factor: int) -> None:
    side = int(tokens**0.5)
    if side * side != tokens or side % factor:
        raise ValueError(f"pixel_shuffle: {tokens} tokens are no square whose side divides by {factor}")
