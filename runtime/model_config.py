"""A model's shape: frozen dataclasses that hold only what vitrail reads of a checkpoint's `config.json`.

Sizes have no defaults: a model is built from its own file, never from its name. `config_forms/llava.py` alone knows
names, of vision halves whose files are elsewhere.
"""

from dataclasses import dataclass
from math import isclose
from typing import Literal

from .errors import ConfigError

NormType = Literal["rms_norm", "layer_norm"]
RopeType = Literal["linear", "dynamic", "longrope"]
Layout = Literal["official", "transformers"]


@dataclass(frozen=True)
class VisionConfig:
    """Shape of an InternViT. Sizes in channels or pixels."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int
    qkv_bias: bool
    qk_normalization: bool
    norm_type: NormType
    layer_norm_eps: float

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ConfigError(f"vision_config: image_size {self.image_size} is below patch_size {self.patch_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the stored position embedding."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change with length. `longrope` carries one factor per frequency."""

    rope_type: RopeType
    factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the language model. One decoder serves every architecture; the flags are the differences."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"llm_config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"llm_config: head_dim {self.head_dim} is odd; rotary positions turn channels in pairs")

    @property
    def max_model_len(self) -> int:
        """The longest context in tokens: dynamic NTK stretches the positions of training by its factor."""
        scaling = self.rope_scaling
        if scaling is not None and scaling.rope_type == "dynamic":
            return int(self.max_position_embeddings * scaling.factor)
        return self.max_position_embeddings

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in a 16-bit cache."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class InternVLConfig:
    """An InternVL-Chat model: vision half, pixel shuffle, language half, and how images become tiles.

    layout: whose names its checkpoint's tensors have.
    """

    vision: VisionConfig
    llm: DecoderConfig
    template: str
    system_message: str | None
    select_layer: int
    downsample_ratio: float
    ps_version: Literal["v1", "v2"]
    tile_size: int
    dynamic_image_size: bool
    use_thumbnail: bool
    min_dynamic_patch: int
    max_dynamic_patch: int
    pad2square: bool
    layout: Layout = "official"

    def __post_init__(self) -> None:
        if not isclose(self.downsample_ratio * self.shuffle_factor, 1):
            raise ConfigError(f"downsample_ratio {self.downsample_ratio} is not 1 over a whole number")
        patches = self.tile_size // self.vision.patch_size
        if self.tile_size % self.vision.patch_size or patches % self.shuffle_factor:
            raise ConfigError(
                f"force_image_size {self.tile_size} must be a multiple of patch_size {self.vision.patch_size} "
                f"x {self.shuffle_factor} (1 / downsample_ratio)"
            )
        if not 1 <= self.vision_depth <= self.vision.num_hidden_layers:
            raise ConfigError(f"select_layer {self.select_layer} lies outside {self.vision.num_hidden_layers} blocks")
        if not 1 <= self.min_dynamic_patch <= self.max_dynamic_patch:
            raise ConfigError(
                f"min_dynamic_patch {self.min_dynamic_patch} and max_dynamic_patch {self.max_dynamic_patch} "
                "must satisfy 1 <= min <= max"
            )

    @property
    def shuffle_factor(self) -> int:
        """Side of the square of patches that pixel shuffle joins into one token."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // self.vision.patch_size // self.shuffle_factor) ** 2

    @property
    def vision_depth(self) -> int:
        """Blocks that must run: `select_layer` indexes the list [embeddings, block 1, ..., block L]."""
        layers = self.vision.num_hidden_layers
        return self.select_layer if self.select_layer >= 0 else layers + 1 + self.select_layer

    @property
    def context_token(self) -> str:
        """The token whose places in a prompt visual tokens take."""
        return "<IMG_CONTEXT>"


@dataclass(frozen=True)
class ContrastiveConfig:
    """An InternVL-C/G model: InternViT, QLLaMA (`llm`), and the heads that bring both to one space of embeddings.

    num_query_tokens: 0 is InternVL-C alone, as its original file holds it: no queries, nothing that looks at an image
    through them, no head that writes.
    """

    vision: VisionConfig
    llm: DecoderConfig
    embed_dim: int
    pool_heads: int
    num_query_tokens: int
    cross_attention_frequency: int

    def __post_init__(self) -> None:
        if self.llm.num_key_value_heads != self.llm.num_attention_heads:
            raise ConfigError("qllama_config: grouped queries are not supported")
        if self.llm.head_dim * self.llm.num_attention_heads != self.llm.hidden_size:
            raise ConfigError(
                f"qllama_config: {self.llm.num_attention_heads} heads of head_dim {self.llm.head_dim} "
                f"do not make hidden_size {self.llm.hidden_size}"
            )
        if self.llm.tie_word_embeddings or self.llm.qkv_bias or self.llm.rope_scaling is not None:
            raise ConfigError("qllama_config: tied embeddings, attention biases and rope_scaling are not supported")
        for half, size in (("vision_config", self.vision.hidden_size), ("qllama_config", self.llm.hidden_size)):
            if size % self.pool_heads:
                raise ConfigError(
                    f"{half}: hidden_size {size} is not a multiple of attn_pool_num_heads {self.pool_heads}"
                )
        if self.num_query_tokens >= self.llm.max_position_embeddings:
            raise ConfigError(
                f"num_query_token {self.num_query_tokens} leaves no room in the {self.llm.max_position_embeddings} "
                "positions of qllama_config"
            )

    def has_cross_attention(self, layer: int) -> bool:
        """Whether QLLaMA's layer (from 0) looks at the image."""
        return self.num_query_tokens > 0 and layer % self.cross_attention_frequency == 0


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(InternVLConfig):
    """An InternVL-Chat 1.0 model: patches go to the language half one by one, through an MLP.

    tower: the name of the vision half. projector_depth: linear layers of the MLP, which `projector_norm` precedes.
    keeps_class_token: it goes with the patches. contrastive: the InternVL-14B whose vision half this is and whose
    queries, read by a second MLP, stand before the patches; None without QLLaMA. An image is one tile: padded to a
    square with `pad2square`, else its middle.
    """

    tower: str
    projector_depth: int
    projector_norm: bool
    keeps_class_token: bool
    contrastive: ContrastiveConfig | None

    @property
    def num_queries(self) -> int:
        return 0 if self.contrastive is None else self.contrastive.num_query_tokens

    @property
    def tokens_per_tile(self) -> int:
        return self.num_queries + self.keeps_class_token + super().tokens_per_tile

    @property
    def feature_layer(self) -> int:
        """The block, counted from 1, whose output goes to the language half."""
        return super().vision_depth

    @property
    def vision_depth(self) -> int:
        """Blocks that must run: the queries look at the output of the last."""
        return self.feature_layer if self.contrastive is None else self.vision.num_hidden_layers

    @property
    def context_token(self) -> str:
        """One that no text becomes: LLaMA's tokenizers spell what they do not know in bytes."""
        return "<unk>"


ModelConfig = InternVLConfig | ContrastiveConfig | VisionConfig
