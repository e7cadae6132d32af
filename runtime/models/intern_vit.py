"""InternViT, 6B and 300M: a plain ViT with LayerScale, and in the 6B RMSNorm and a QK-norm over all heads at once.

There is no norm after the last block. Parameter names are the checkpoint's.
"""

from collections.abc import Collection
from itertools import zip_longest
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import tile_attention
from ...kernels.patch_embedding import patch_embedding
from ...kernels.qk_norm import qk_norm
from ...kernels.residual import scaled_residual
from ..config import VisionConfig
from ..layers.linear import Linear, LinearGelu
from ..layers.norm import RMSNorm, make_norm


class Embeddings(nn.Module):
    """uint8 tiles to tokens: patches, class token first, positions interpolated to the tiles' grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = nn.ParameterDict(
            {
                "weight": nn.Parameter(torch.empty(config.hidden_size, 3, patch, patch)),
                "bias": nn.Parameter(torch.empty(config.hidden_size)),
            }
        )
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.grid_size**2, config.hidden_size))

    def forward(self, tiles: Tensor) -> Tensor:
        patch = self.config.patch_size
        return patch_embedding(
            tiles,
            self.patch_embedding["weight"].flatten(1),
            self.patch_embedding["bias"],
            self.class_embedding.flatten(),
            self.positions(tiles.shape[1] // patch, tiles.shape[2] // patch),
            patch,
        )

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1 + rows * columns, hidden): the stored grid, bicubically interpolated in fp32 where the size differs."""
        stored = self.position_embedding[0]
        grid = self.config.grid_size
        if (rows, columns) == (grid, grid):
            return stored
        image = stored[1:].float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(image, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((stored[:1], resized[0].flatten(1).t().to(stored.dtype)))


class Attention(nn.Module):
    """Bidirectional attention over the tokens of one tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.hidden_size, config.layer_norm_eps) if config.qk_normalization else None
        self.k_norm = RMSNorm(config.hidden_size, config.layer_norm_eps) if config.qk_normalization else None
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)  # [tiles, tokens, 3 * hidden]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qk_norm(qkv, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        else:
            q, k, v = qkv.chunk(3, dim=-1)
        heads = (*x.shape[:2], self.num_heads, -1)
        out = tile_attention(q.view(heads), k.view(heads), v.view(heads))
        return self.proj(out.reshape(x.shape))


class MLP(nn.Module):
    """fc2(GELU(fc1(x)))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = LinearGelu(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)).

    An addition and the norm after it are one kernel, and the last addition's norm is the next block's: `forward` takes
    x with its norm1, and returns x before the last addition with what is to be added.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config.norm_type, config.hidden_size, config.layer_norm_eps)
        self.attn = Attention(config)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = make_norm(config.norm_type, config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """x, norm1(x): (tiles, tokens, hidden). Returns x after the attention, and the MLP's branch, not yet added."""
        x, normed = self.norm2.after_residual(x, self.attn(normed), self.ls1)
        return x, self.mlp(normed)


class Encoder(nn.Module):
    """The blocks, one level below the model as checkpoints name them."""

    def __init__(self, config: VisionConfig, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(config) for _ in range(depth)])


class InternViT(nn.Module):
    """The vision encoder. `depth` blocks are built; the default is all of them."""

    def __init__(self, config: VisionConfig, depth: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        depth = config.num_hidden_layers if depth is None else depth
        self.encoder = Encoder(config, depth)

    def forward(self, tiles: Tensor) -> Tensor:
        """Output of the last block. tiles: (n, height, width, 3) uint8. Returns (n, 1 + patches, hidden)."""
        depth = len(self.encoder.layers)
        return self.hidden_states(tiles, (depth,))[depth]

    def hidden_states(self, tiles: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """Outputs of the blocks asked for, 1-based; 0 is the embeddings. Stops after the deepest one."""
        x = self.embeddings(tiles)
        states = {0: x} if 0 in layers else {}
        blocks = cast(list[Block], list(self.encoder.layers[: max(layers)]))
        normed = blocks[0].norm1(x) if blocks else x
        for index, (block, following) in enumerate(zip_longest(blocks, blocks[1:]), start=1):
            x, branch = block(x, normed)
            if following is not None:
                x, normed = following.norm1.after_residual(x, branch, block.ls2)
            else:
                x = scaled_residual(x, branch, block.ls2)
            if index in layers:
                states[index] = x
        return {layer: states[layer] for layer in layers}
