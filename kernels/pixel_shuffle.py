"""Pixel shuffle, the projector's token compression, with the LayerNorm that follows it.

v2: out[i, j, s * D + c] = in[k*i + s // k, k*j + s % k, c]: the k*k neighbours of a square become channel blocks in
row-major order. v1 is v2 with the two spatial axes of the result swapped.
The kernel gathers a square's tokens into registers and norms them there: one read and one write, where the shuffle
as a copy and the norm need two of each.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import target_of
from .language import kernel, next_power_of_2, row_warps, tl
from .launch import launch

PixelShuffleVersion = Literal["v1", "v2"]


@kernel(unspecialized=("side",))
def _pixel_shuffle_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,  # one square of tokens, one row of out
    side, channels,  # squares along a side; D
    tile_stride, token_stride,
    eps,
    FACTOR: tl.constexpr, TRANSPOSED: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile, i, j = row // (side * side), row // side % side, row % side
    if TRANSPOSED:
        i, j = j, i
    s = tl.arange(0, SQUARE)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (s < FACTOR * FACTOR) & (c < channels)
    token = (FACTOR * i + s // FACTOR) * (FACTOR * side) + FACTOR * j + s % FACTOR
    wide = s * channels + c
    size = FACTOR * FACTOR * channels

    x = tl.load(x_ptr + tile.to(tl.int64) * tile_stride + token * token_stride + c, mask=inside, other=0.0)
    x = x.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / size, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred) / size + eps)
    # Not before the sums: 63 registers instead of 85, and with 12,800 channels two rows at a time on a multiprocessor.
    y *= tl.load(weight_ptr + wide, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + wide, mask=inside, other=0.0).to(tl.float32)

    tl.store(out_ptr + row.to(tl.int64) * size + wide, y.to(out_ptr.dtype.element_ty), mask=inside)


def pixel_shuffle_reference(x: Tensor, factor: int, version: PixelShuffleVersion) -> Tensor:
    """x: (tiles, side * side, D) patch tokens, row-major. Returns (tiles, (side / factor)^2, factor^2 * D)."""
    tiles, tokens, channels = x.shape
    side = int(tokens**0.5) // factor
    squares = x.reshape(tiles, side, factor, side, factor, channels)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return squares.permute(order).reshape(tiles, side * side, factor * factor * channels)


def pixel_shuffle_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: int, version: PixelShuffleVersion
) -> Tensor:
    """LayerNorm of the shuffled tokens.

    x: (tiles, side * side, D) patch tokens, row-major, last dim contiguous: e.g. a view behind the class token.
    weight, bias: (factor^2 * D,). Returns (tiles, (side / factor)^2, factor^2 * D).
    """
    tiles, tokens, channels = x.shape
    side, remainder = divmod(int(tokens**0.5), factor)
    if (side * factor) ** 2 != tokens or remainder:
        raise ValueError(f"pixel_shuffle_norm: {tokens} tokens are no square whose side divides by {factor}")
    size = factor * factor * channels
    if weight.shape[0] != size:
        raise ValueError(f"pixel_shuffle_norm: {size} shuffled channels, weight {weight.shape[0]}")
    if target_of(x, weight, bias) is None:
        return pixel_shuffle_norm_reference(x, weight, bias, eps, factor, version)
    if x.stride(2) != 1:
        x = x.contiguous()
    out = torch.empty((tiles, side * side, size), dtype=x.dtype, device=x.device)
    square, block = next_power_of_2(factor * factor), next_power_of_2(channels)
    launch(
        _pixel_shuffle_norm_kernel,
        (tiles * side * side,),
        *(x, weight, bias, out),
        *(side, channels),
        *(x.stride(0), x.stride(1)),
        eps,
        num_warps=row_warps(square * block),
        FACTOR=factor,
        TRANSPOSED=version == "v1",
        SQUARE=square,
        BLOCK=block,
    )
    return out


def pixel_shuffle_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: int, version: PixelShuffleVersion
) -> Tensor:
    shuffled = pixel_shuffle_reference(x, factor, version)
    return F.layer_norm(shuffled, (shuffled.shape[-1],), weight, bias, eps)
