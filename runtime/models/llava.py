"""InternVL-Chat 1.0: InternViT, a plain MLP in place of pixel shuffle, LLaMA; and the same with QLLaMA's queries.

With QLLaMA an image is what its queries gathered from the last block, then its patches from the block selected, each
through an MLP of its own.
"""

import torch
from torch import Tensor, nn

from ..config import LlavaConfig
from ..layers.linear import Linear, LinearGelu
from ..layers.norm import LayerNorm
from .internvl import PROJECTOR_NORM_EPS, InternVLModel
from .qllama import QLLaMA


class MLP(nn.Module):
    """Linear layers with GELU between them, behind a LayerNorm if `norm`."""

    def __init__(self, in_features: int, out_features: int, depth: int, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm(in_features, PROJECTOR_NORM_EPS) if norm else None
        sizes = [in_features] + [out_features] * (depth - 1)
        self.layers = nn.ModuleList(
            [*(LinearGelu(size, out_features) for size in sizes[:-1]), Linear(sizes[-1], out_features, bias=True)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Returns (..., out_features)."""
        if self.norm is not None:
            x = self.norm(x)
        for layer in self.layers:
            x = layer(x)
        return x


class LlavaProjector(nn.Module):
    """From the vision half to the language half: `mlp` for patches, `query_mlp` for queries."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        hidden, depth = config.llm.hidden_size, config.projector_depth
        self.mlp = MLP(config.vision.hidden_size, hidden, depth, norm=config.projector_norm)
        contrastive = config.contrastive
        self.query_mlp = None if contrastive is None else MLP(contrastive.llm.hidden_size, hidden, depth)

    def forward(self, patches: Tensor, queries: Tensor | None = None) -> Tensor:
        """patches: (n, patches, vision hidden); queries: (n, queries, QLLaMA's hidden). Queries come first."""
        projected: Tensor = self.mlp(patches)
        if self.query_mlp is None or queries is None:
            return projected
        return torch.cat((self.query_mlp(queries), projected), dim=1)


class LlavaModel(InternVLModel):
    """All parts of an InternVL-Chat 1.0 checkpoint that generation needs."""

    config: LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config, LlavaProjector(config))
        self.qllama: QLLaMA | None = None
        if config.contrastive is not None:
            queries = (1, config.num_queries, config.contrastive.llm.hidden_size)
            self.query_tokens = nn.Parameter(torch.empty(queries))
            self.qllama = QLLaMA(config.contrastive, reads_text=False)

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """tiles: (n, tile_size, tile_size, 3) uint8. Returns (n, tokens_per_tile, llm hidden) visual tokens."""
        config = self.config
        states = self.vision_model.hidden_states(tiles, {config.feature_layer, config.vision_depth})
        patches = states[config.feature_layer][:, 0 if config.keeps_class_token else 1 :]
        queries = None
        if self.qllama is not None:
            queries = self.qllama.gather(self.query_tokens, states[config.vision_depth])
        visual: Tensor = self.projector(patches, queries)
        return visual
