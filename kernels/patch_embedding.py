"""From uint8 tiles to ViT tokens: normalise, patch projection, class token, positions.

(u8 / 255 - mean) / std with the ImageNet constants, then the 14x14 convolution as a matrix product over
channel-major patches, then [class, patches] + positions.
The kernel is that matrix product, its left operand gathered from the bytes of the tiles: no float image is ever in
memory, and positions and class token are added where the product is stored. Columns stay in the weight's order: bytes
of a patch are few and near each other, so that gathering them is cheaper than gathering the weight in theirs.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Arch, target_of
from .language import cdiv, jit, kernel, tl
from .launch import launch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The same as one multiplication and addition, u8 * scale + shift. After rounding to bf16 or fp16 all 256 values of all
# channels are equal to those of the two divisions; in fp32 the last bits differ.
SCALES = tuple(1 / (255 * std) for std in IMAGENET_STD)
SHIFTS = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))

# Gathering costs as many issue slots as there are cycles of multiplication, so that two programs share a multiprocessor
# and one gathers while the other multiplies: blocks with at most 128 registers a thread.
BLOCKS: Mapping[Arch, Mapping[str, Any]] = {
    "sm_80": {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 16, "num_warps": 8, "num_stages": 4},
    "sm_90": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
FP32_BLOCKS: Mapping[str, Any] = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


@jit
def _of_channel(channel, values):
    return tl.where(channel == 0, values[0], tl.where(channel == 1, values[1], values[2]))


@jit
def _normalised_pixels(tile_ptr, corner, start, columns, scale, shift, PATCH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns from `start` on of the patches that begin at byte `corner`; past the last column, that one again."""
    k = tl.minimum(start + tl.arange(0, BLOCK_K), 3 * PATCH * PATCH - 1)
    channel, y, x = k // (PATCH * PATCH), k // PATCH % PATCH, k % PATCH
    place = corner[:, None] + ((y * columns * PATCH + x) * 3 + channel)[None, :]
    pixel = tl.load(tile_ptr + place).to(tl.float32)
    return pixel * _of_channel(channel, scale)[None, :] + _of_channel(channel, shift)[None, :]


@kernel(unspecialized=("columns", "patches"))
def _patch_embedding_kernel(
    tiles_ptr, weight_ptr, bias_ptr, class_ptr, positions_ptr, out_ptr,
    columns, patches, hidden,  # patches in a row of a tile, in a tile
    red_scale, green_scale, blue_scale,
    red_shift, green_shift, blue_shift,
    PATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(2).to(tl.int64)
    p = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    size: tl.constexpr = 3 * PATCH * PATCH  # known to the compiler, so that loads of weights are as wide as it allows
    dtype = weight_ptr.dtype.element_ty
    scale, shift = (red_scale, green_scale, blue_scale), (red_shift, green_shift, blue_shift)
    shown = tl.minimum(p, patches - 1)  # past the last patch that one again: no mask for bytes, and it is not stored
    corner = (shown // columns * (columns * PATCH) + shown % columns) * (3 * PATCH)
    tile_ptr = tiles_ptr + tile * (patches * size)
    inside = n < hidden

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pixels = _normalised_pixels(tile_ptr, corner, 0, columns, scale, shift, PATCH, BLOCK_K).to(dtype)
    for start in range(0, size, BLOCK_K):
        # One step ahead, so that bytes arrive while the tensor cores work on those before.
        following = _normalised_pixels(tile_ptr, corner, start + BLOCK_K, columns, scale, shift, PATCH, BLOCK_K)
        k = start + tl.arange(0, BLOCK_K)
        there = (k < size)[:, None] & inside[None, :]
        weight = tl.load(weight_ptr + n[None, :] * size + k[:, None], mask=there, other=0.0)
        total = tl.dot(pixels, weight, total, input_precision="ieee")
        pixels = following.to(dtype)

    here = (1 + p)[:, None] * hidden + n[None, :]
    kept = (p < patches)[:, None] & inside[None, :]
    out_ptr += tile * ((1 + patches) * hidden)
    bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + here, mask=kept, other=0.0).to(tl.float32)
    projection = (total + bias[None, :]).to(dtype).to(tl.float32)  # rounded as a projection of its own would be
    tl.store(out_ptr + here, (projection + position).to(dtype), mask=kept)
    if tl.program_id(1) == 0:
        token = tl.load(class_ptr + n, mask=inside, other=0.0).to(tl.float32)
        token += tl.load(positions_ptr + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + n, token.to(dtype), mask=inside)


def patch_embedding(
    tiles: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor, patch_size: int
) -> Tensor:
    """tiles: (n, height, width, 3) uint8, sides multiples of `patch_size`. Returns (n, 1 + patches, hidden).

    weight: (hidden, 3 * patch_size^2), channel-major columns; bias, class_token: (hidden,);
    positions: (1 + patches, hidden), the class token's first.
    """
    if tiles.dtype != torch.uint8 or tiles.dim() != 4 or tiles.shape[3] != 3:
        raise ValueError(f"patch_embedding: tiles must be uint8 (n, h, w, 3), not {tiles.dtype} {tuple(tiles.shape)}")
    height, width = tiles.shape[1:3]
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_embedding: {width}x{height} is not a multiple of patch size {patch_size}")
    patches = (height // patch_size) * (width // patch_size)
    if positions.shape[0] != 1 + patches:
        raise ValueError(f"patch_embedding: {patches} patches need {1 + patches} positions, not {positions.shape[0]}")
    target = target_of(tiles, weight, bias, class_token, positions)
    if target is None:
        return patch_embedding_reference(tiles, weight, bias, class_token, positions, patch_size)
    hidden = weight.shape[0]
    out = torch.empty((tiles.shape[0], 1 + patches, hidden), dtype=weight.dtype, device=tiles.device)
    blocks = FP32_BLOCKS if weight.dtype == torch.float32 else BLOCKS[target.arch]
    launch(
        _patch_embedding_kernel,
        (cdiv(hidden, blocks["BLOCK_N"]), cdiv(patches, blocks["BLOCK_M"]), tiles.shape[0]),
        *(tiles.contiguous(), weight.contiguous(), bias, class_token, positions.contiguous(), out),
        *(width // patch_size, patches, hidden),
        *SCALES,
        *SHIFTS,
        PATCH=patch_size,
        **blocks,
    )
    return out


def patch_embedding_reference(
    tiles: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor, patch_size: int
) -> Tensor:
    n, height, width, channels = tiles.shape
    rows, columns = height // patch_size, width // patch_size
    # Gathering patches while they are bytes moves a quarter of what it would as floats.
    patches = tiles.reshape(n, rows, patch_size, columns, patch_size, channels).permute(0, 1, 3, 5, 2, 4)
    pixels = patches.reshape(n, rows * columns, channels, patch_size * patch_size).float().div_(255)
    mean = torch.tensor(IMAGENET_MEAN, device=tiles.device)[:, None]
    std = torch.tensor(IMAGENET_STD, device=tiles.device)[:, None]
    pixels = pixels.sub_(mean).div_(std).flatten(2).to(weight.dtype)
    tokens = F.linear(pixels, weight, bias)
    return torch.cat((class_token.expand(n, 1, -1), tokens), dim=1) + positions
