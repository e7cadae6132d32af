"""InternVL-Chat: InternViT, pixel shuffle, projector, decoder; visual tokens take the places of `<IMG_CONTEXT>`."""

from typing import cast

from torch import Tensor, nn

from ...kernels.pixel_shuffle import pixel_shuffle_norm
from ..config import InternVLConfig
from ..layers.linear import Linear, LinearGelu
from ..layers.norm import LayerNorm
from ..layers.parallel import WHOLE, Part, TensorParallel
from .decoder import Decoder
from .intern_vit import InternViT

# PyTorch's default, unlike the 1e-6 of the ViT's own norms.
PROJECTOR_NORM_EPS = 1e-5


class Projector(nn.Module):
    """Pixel shuffle and `mlp1`: patch tokens of a tile to visual tokens of the language model."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.factor = config.shuffle_factor
        self.version = config.ps_version
        shuffled = self.factor**2 * config.vision.hidden_size
        self.norm = LayerNorm(shuffled, PROJECTOR_NORM_EPS)
        self.linear_1 = LinearGelu(shuffled, config.llm.hidden_size)
        self.linear_2 = Linear(config.llm.hidden_size, config.llm.hidden_size, bias=True)

    def forward(self, patches: Tensor) -> Tensor:
        """patches: (tiles, side^2, vision hidden). Returns (tiles, (side / factor)^2, llm hidden)."""
        norm = self.norm
        x = pixel_shuffle_norm(patches, norm.weight, norm.bias, norm.eps, self.factor, self.version)
        return cast(Tensor, self.linear_2(self.linear_1(x)))


class InternVLModel(nn.Module):
    """Both halves of an InternVL-Chat checkpoint, or the part of them that a process holds.

    projector: what stands between them, pixel shuffle by default. parallel: the other ranks of the language half.
    """

    part = WHOLE

    def __init__(
        self,
        config: InternVLConfig,
        projector: nn.Module | None = None,
        *,
        part: Part = WHOLE,
        parallel: TensorParallel | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision_model = InternViT(config.vision, config.vision_depth)
        self.projector = Projector(config) if projector is None else projector
        self.language_model = Decoder(config.llm)
        if part != WHOLE:
            self.reduce_to(part, parallel)

    def reduce_to(self, part: Part, parallel: TensorParallel | None = None) -> None:
        """Drop what a part does not hold. To be called before weights are loaded."""
        self.part = part
        if part.splits_language:
            self.language_model = Decoder(self.config.llm, part, parallel)
        parameters = [name for name, _ in self.named_parameters(recurse=False)]
        for name in [*(name for name, _ in self.named_children()), *parameters]:
            if not part.holds(f"{name}."):
                delattr(self, name)

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """tiles: (n, tile_size, tile_size, 3) uint8. Returns (n, tokens_per_tile, llm hidden) visual tokens."""
        features = self.vision_model(tiles)
        return cast(Tensor, self.projector(features[:, 1:]))  # without the class token

    def splice(self, token_ids: Tensor, visual_tokens: Tensor, context_id: int) -> Tensor:
        """Embeddings of a prompt with visual tokens in the places of `<IMG_CONTEXT>`.

        token_ids: (tokens,) int64; visual_tokens: (visual, hidden), in order. Returns (tokens, hidden).
        Raises `ValueError` when places and visual tokens differ in number.
        """
        embeddings = self.language_model.embed(token_ids)
        places = token_ids == context_id
        count = int(places.sum())
        if count != visual_tokens.shape[0]:
            raise ValueError(f"splice: {count} image places in the prompt, {visual_tokens.shape[0]} visual tokens")
        if count:
            embeddings = embeddings.masked_scatter(places[:, None], visual_tokens.to(embeddings.dtype))
        return embeddings
