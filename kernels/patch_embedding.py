"""From uint8 tiles to ViT tokens: normalise, patch projection, class token, positions.

(u8 / 255 - mean) / std with the ImageNet constants, then the 14x14 convolution as a matrix product over
channel-major patches, then [class, patches] + positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    return patch_embedding_reference(tiles, weight, bias, class_token, positions, patch_size)


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
