"""What a checkpoint's `config.json` says, read into frozen dataclasses that hold only what vitrail reads.

The fields and their defaults follow the official configurations: InternVL-Chat (`model_type: internvl_chat`), the
contrastive InternVL-C/G (`internvl` with a `qllama_config`) and InternViT on its own (`intern_vit_6b`).
Sizes have no defaults: a model is always built from its own file, never from its name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isclose, log, sqrt
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError, ConfigError

NormType = Literal["rms_norm", "layer_norm"]
RopeType = Literal["linear", "dynamic", "longrope"]


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
    """An InternVL-Chat model: vision half, pixel shuffle, language half, and how images become tiles."""

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


@dataclass(frozen=True)
class ContrastiveConfig:
    """An InternVL-C/G model: InternViT, QLLaMA (`llm`), and the heads that bring both to one space of embeddings."""

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
        return layer % self.cross_attention_frequency == 0


ModelConfig = InternVLConfig | ContrastiveConfig | VisionConfig


class _Section:
    """A JSON object whose missing or mistyped entries become a `ConfigError` that names them."""

    def __init__(self, values: Any, name: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name}: expected an object, found {type(values).__name__}")
        self.values = values
        self.name = name

    def _get(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self.name}: `{key}` is missing")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{self.name}: `{key}` must be {kinds[0].__name__}, found {value!r}")
        return value

    def size(self, key: str, default: Any = ...) -> int:
        value = self._get(key, (int,), default)
        if value is not None and value < 1:
            raise ConfigError(f"{self.name}: `{key}` must be positive, found {value}")
        return int(value)

    def integer(self, key: str, default: Any = ...) -> int:
        return int(self._get(key, (int,), default))

    def number(self, key: str, default: Any = ...) -> float:
        value = self._get(key, (float, int), default)
        if not 0 < value < inf:  # JSON as Python reads it also has NaN and Infinity
            raise ConfigError(f"{self.name}: `{key}` must be positive and finite, found {value}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise ConfigError(f"{self.name}: `{key}` must list {count} numbers")
        entries = _Section({f"{key}[{index}]": value for index, value in enumerate(values)}, self.name)
        return tuple(entries.number(entry) for entry in entries.values)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, (bool,), default))

    def text(self, key: str, default: Any = ...) -> str:
        return str(self._get(key, (str,), default))

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = ...) -> Any:
        value = self.text(key, default)
        if value not in allowed:
            raise ConfigError(f"{self.name}: `{key}` is {value!r}; known: {', '.join(allowed)}")
        return value


def _parse_vision(values: Any) -> VisionConfig:
    section = _Section(values, "vision_config")
    section.choice("hidden_act", ("gelu",), "gelu")
    return VisionConfig(
        hidden_size=section.size("hidden_size"),
        num_attention_heads=section.size("num_attention_heads"),
        intermediate_size=section.size("intermediate_size"),
        num_hidden_layers=section.size("num_hidden_layers"),
        image_size=section.size("image_size"),
        patch_size=section.size("patch_size"),
        qkv_bias=section.flag("qkv_bias", False),
        qk_normalization=section.flag("qk_normalization", True),
        # Checkpoints older than the field are all RMSNorm.
        norm_type=section.choice("norm_type", ("rms_norm", "layer_norm"), "rms_norm"),
        layer_norm_eps=section.number("layer_norm_eps", 1e-6),
    )


def _parse_rope_scaling(section: _Section, max_position_embeddings: int, head_dim: int) -> RopeScaling | None:
    raw = section.values.get("rope_scaling")
    if raw is None:
        return None
    scaling = _Section(raw, f"{section.name}.rope_scaling")
    kind = scaling.text("rope_type" if "rope_type" in scaling.values else "type")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return RopeScaling(rope_type="linear" if kind == "linear" else "dynamic", factor=scaling.number("factor"))
    if kind in ("longrope", "su"):
        original = section.size("original_max_position_embeddings")
        if original == 1:
            raise ConfigError(f"{section.name}: `original_max_position_embeddings` must be above 1")
        return RopeScaling(
            rope_type="longrope",
            factor=max_position_embeddings / original,
            short_factor=scaling.numbers("short_factor", head_dim // 2),
            long_factor=scaling.numbers("long_factor", head_dim // 2),
            original_max_position_embeddings=original,
            attention_factor=_longrope_attention_factor(max_position_embeddings / original, original),
        )
    raise ConfigError(f"{scaling.name}: unknown type {kind!r}; known: linear, dynamic, longrope, su")


def _longrope_attention_factor(scale: float, original_length: int) -> float:
    """sqrt(1 + ln(scale) / ln(original length)), Phi-3's scaling of cos and sin; 1 where nothing is stretched."""
    return sqrt(1 + log(scale) / log(original_length)) if scale > 1 else 1.0


_ARCHITECTURES = (
    "InternLM2ForCausalLM",
    "LlamaForCausalLM",
    "InternLMForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
)


def _parse_decoder(values: Any) -> DecoderConfig:
    section = _Section(values, "llm_config")
    architectures = section.values.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError("llm_config: `architectures` is missing; it says which language model this is")
    architecture = architectures[0]
    if architecture not in _ARCHITECTURES:
        raise ConfigError(f"llm_config: unknown architecture {architecture!r}; known: {', '.join(_ARCHITECTURES)}")
    return _parse_architecture(section, architecture)


def _parse_architecture(section: _Section, architecture: str) -> DecoderConfig:
    name = section.name
    section.choice("hidden_act", ("silu",), "silu")
    if section.flag("mlp_bias", False):
        raise ConfigError(f"{name}: `mlp_bias` true is not supported")
    if section.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{name}: `partial_rotary_factor` other than 1 is not supported")

    heads = section.size("num_attention_heads")
    hidden_size = section.size("hidden_size")
    if section.values.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(f"{name}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    head_dim = section.size("head_dim", hidden_size // heads)
    max_positions = section.size("max_position_embeddings")
    sliding_window = section.values.get("sliding_window")
    # Within its window a sliding-window model is an ordinary one, so the window only caps the context.
    windowed = section.flag("use_sliding_window", architecture == "Phi3ForCausalLM") and sliding_window
    scaling = _parse_rope_scaling(section, max_positions, head_dim)
    if architecture == "InternLM2ForCausalLM" or architecture == "InternLMForCausalLM":
        qkv_bias = output_bias = section.flag("bias", True)
    elif architecture == "Qwen2ForCausalLM":
        qkv_bias, output_bias = True, False
    else:
        qkv_bias = output_bias = section.flag("attention_bias", False)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=section.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=section.size("intermediate_size"),
        num_hidden_layers=section.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=section.size("num_key_value_heads", heads),
        head_dim=head_dim,
        rms_norm_eps=section.number("rms_norm_eps"),
        rope_theta=section.number("rope_theta", 10000.0),
        rope_scaling=scaling,
        max_position_embeddings=min(max_positions, section.size("sliding_window")) if windowed else max_positions,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=section.flag("tie_word_embeddings", False),
    )


def parse_config(values: Mapping[str, Any]) -> InternVLConfig:
    """Read an official InternVL-Chat `config.json`, already decoded. Raises `ConfigError` naming the entry."""
    section = _Section(values, "config.json")
    model_type = section.values.get("model_type")
    if model_type != "internvl_chat":
        if "qllama_config" in section.values:
            raise ConfigError("config.json: this is a contrastive model (InternVL-C/G), not a chat model")
        hint = " (the transformers-native form; use the original checkpoint)" if model_type == "internvl" else ""
        raise ConfigError(f"config.json: unknown model_type {model_type!r}{hint}; known: internvl_chat")
    for key in ("use_backbone_lora", "use_llm_lora"):
        if section.values.get(key):
            raise ConfigError(f"config.json: `{key}` is {section.values[key]}; merge the LoRA weights first")
    vision = _parse_vision(section.values.get("vision_config"))
    message = section.values.get("system_message")
    return InternVLConfig(
        vision=vision,
        llm=_parse_decoder(section.values.get("llm_config")),
        template=section.text("template"),
        system_message=None if message is None else section.text("system_message"),
        select_layer=section.integer("select_layer", -1),
        downsample_ratio=section.number("downsample_ratio", 0.5),
        ps_version=section.choice("ps_version", ("v1", "v2"), "v1"),
        tile_size=section.size("force_image_size", vision.image_size),
        dynamic_image_size=section.flag("dynamic_image_size", False),
        use_thumbnail=section.flag("use_thumbnail", False),
        min_dynamic_patch=section.size("min_dynamic_patch", 1),
        max_dynamic_patch=section.size("max_dynamic_patch", 6),
        pad2square=section.flag("pad2square", False),
    )


def parse_contrastive_config(values: Mapping[str, Any]) -> ContrastiveConfig:
    """Read an official InternVL-C/G `config.json`, already decoded. Raises `ConfigError` naming the entry."""
    section = _Section(values, "config.json")
    for key in ("use_backbone_lora", "use_qllama_lora"):
        if section.values.get(key):
            raise ConfigError(f"config.json: `{key}` is {section.values[key]}; merge the LoRA weights first")
    vision = _parse_vision(section.values.get("vision_config"))
    return ContrastiveConfig(
        # A checkpoint tuned at another size stores the positions of that size, whatever its vision_config says.
        vision=replace(vision, image_size=section.size("force_image_size", vision.image_size)),
        llm=_parse_architecture(_Section(section.values.get("qllama_config"), "qllama_config"), "LlamaForCausalLM"),
        embed_dim=section.size("clip_embed_dim", 768),
        pool_heads=section.size("attn_pool_num_heads", 16),
        num_query_tokens=section.size("num_query_token", 96),
        cross_attention_frequency=section.size("cross_attention_frequency", 2),
    )


def parse_any_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read a decoded `config.json` of any model that vitrail runs."""
    if isinstance(values, Mapping):
        if values.get("model_type") == "internvl" and "qllama_config" in values:
            return parse_contrastive_config(values)
        if values.get("model_type") == "intern_vit_6b":  # the 300M's too
            return _parse_vision(values)
    return parse_config(values)


def load_config(source: str | Path | Mapping[str, Any]) -> InternVLConfig:
    """Read the config of a chat model: a checkpoint folder, or an already decoded `config.json`."""
    return parse_config(_decoded(source))


def load_any_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Read the config of any model that vitrail runs: a checkpoint folder, or an already decoded `config.json`."""
    return parse_any_config(_decoded(source))


def _decoded(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source) / "config.json"
    try:
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not valid JSON") from None
    return values
