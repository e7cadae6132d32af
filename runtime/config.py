"""What a checkpoint's `config.json` says, read into frozen dataclasses that hold only what vitrail reads.

The fields and their defaults follow the official configurations: InternVL-Chat (`model_type: internvl_chat`), its
transformers-native form (`internvl` with a `text_config`), InternVL-Chat 1.0 (LLaVA's form, `mm_vision_tower`), the
contrastive InternVL-C/G (`internvl` with a `qllama_config`) and InternViT on its own (`intern_vit_6b`).
Sizes have no defaults: a model is always built from its own file, never from its name. The vision half of LLaVA's form
is the exception, whose file says no more of it than the name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isclose, log, sqrt
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError, ConfigError

NormType = Literal["rms_norm", "layer_norm"]
RopeType = Literal["linear", "dynamic", "longrope"]
Layout = Literal["official", "transformers"]

# InternVL-C as it was first published: weights alone, of one size.
ORIGINAL_C = "internvl_c_13b_224px.pth"


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
        raw = section.values.get("rope_parameters")  # transformers' name for it, with the base inside
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
    rope = _Section(section.values.get("rope_parameters") or {}, f"{name}.rope_parameters")
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
        rope_theta=section.number("rope_theta", rope.number("rope_theta", 10000.0)),
        rope_scaling=scaling,
        max_position_embeddings=min(max_positions, section.size("sliding_window")) if windowed else max_positions,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=section.flag("tie_word_embeddings", False),
    )


def parse_config(values: Mapping[str, Any]) -> InternVLConfig:
    """Read a chat model's `config.json`, already decoded. Raises `ConfigError` naming the entry.

    What other files of a checkpoint add to it stands under `preprocessor_config` and `vision_tower_config`.
    """
    section = _Section(values, "config.json")
    model_type = section.values.get("model_type")
    if "mm_vision_tower" in section.values:
        return _parse_llava(section)
    if "qllama_config" in section.values:
        raise ConfigError("config.json: this is a contrastive model (InternVL-C/G), not a chat model")
    if model_type == "internvl":
        return _parse_transformers(section)
    if model_type != "internvl_chat":
        raise ConfigError(f"config.json: unknown model_type {model_type!r}; known: internvl_chat, internvl")
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


# Language models that the transformers-native form is known to have; InternLM2's are LLaMAs there.
_TEXT_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_IMAGE_MEAN, _IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _parse_transformers(section: _Section) -> InternVLConfig:
    """The transformers-native form, which exists of InternVL2.5 and later alone: one template, one way to tile."""
    text = _Section(section.values.get("text_config"), "text_config")
    architecture = _TEXT_MODELS[text.choice("model_type", tuple(_TEXT_MODELS))]
    section.choice("projector_hidden_act", ("gelu",), "gelu")
    section.choice("vision_feature_select_strategy", ("default",), "default")
    vision = _parse_transformers_vision(section.values.get("vision_config"))
    processor = _Section(section.values.get("preprocessor_config") or {}, "preprocessor_config.json")
    for key, expected in (("image_mean", _IMAGE_MEAN), ("image_std", _IMAGE_STD)):
        if key in processor.values and processor.numbers(key, 3) != expected:
            raise ConfigError(f"{processor.name}: `{key}` is {processor.values[key]}; known: {list(expected)}")
    # True is the default of the form as a whole, and defaults are not always written down.
    tied = section.flag("tie_word_embeddings", text.flag("tie_word_embeddings", True))
    return InternVLConfig(
        vision=vision,
        llm=replace(_parse_architecture(text, architecture), tie_word_embeddings=tied),
        template="internvl2_5",
        system_message=None,
        select_layer=section.integer("vision_feature_layer", -1),
        downsample_ratio=section.number("downsample_ratio", 0.5),
        ps_version="v2",
        tile_size=_square(_Section(processor.values.get("size") or {}, f"{processor.name}.size"), vision.image_size),
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=processor.size("min_patches", 1),
        max_dynamic_patch=processor.size("max_patches", 12),
        pad2square=False,
        layout="transformers",
    )


def _parse_transformers_vision(values: Any) -> VisionConfig:
    section = _Section(values, "vision_config")
    section.choice("hidden_act", ("gelu",), "gelu")
    for key, expected in (
        ("use_mean_pooling", True),
        ("use_absolute_position_embeddings", True),
        ("use_mask_token", False),
    ):
        if section.flag(key, expected) is not expected:
            raise ConfigError(f"vision_config: `{key}` {not expected} is not supported")
    return VisionConfig(
        hidden_size=section.size("hidden_size"),
        num_attention_heads=section.size("num_attention_heads"),
        intermediate_size=section.size("intermediate_size"),
        num_hidden_layers=section.size("num_hidden_layers"),
        image_size=_side(section, "image_size"),
        patch_size=_side(section, "patch_size"),
        qkv_bias=section.flag("attention_bias", False),
        qk_normalization=section.flag("use_qk_norm", False),
        norm_type=section.choice("norm_type", ("rms_norm", "layer_norm"), "layer_norm"),
        layer_norm_eps=section.number("layer_norm_eps", 1e-6),
    )


def _side(section: _Section, key: str) -> int:
    """A size that stands there as one number or as a pair of equal ones."""
    pair = section.values.get(key)
    if not isinstance(pair, list):
        return section.size(key)
    if len(pair) != 2 or pair[0] != pair[1]:
        raise ConfigError(f"{section.name}: `{key}` is {pair}; only squares are supported")
    return _Section({key: pair[0]}, section.name).size(key)


def _square(size: _Section, default: int) -> int:
    """The side that an image processor's {height, width} has."""
    height, width = size.size("height", default), size.size("width", default)
    if height != width:
        raise ConfigError(f"{size.name}: {height}x{width}; only squares are supported")
    return height


def _parse_llava(section: _Section) -> LlavaConfig:
    """LLaVA's form: the language model's own entries, and `mm_*` ones of the vision half and the projector."""
    architectures = section.values.get("architectures")
    if architectures != ["LlavaLlamaForCausalLM"]:
        raise ConfigError(f"config.json: unknown architectures {architectures}; known: ['LlavaLlamaForCausalLM']")
    if section.flag("mm_use_im_start_end", False):
        raise ConfigError("config.json: `mm_use_im_start_end` true is not supported")
    # InternLM calls its biases `bias`, LLaMA `attention_bias`.
    llm = _parse_architecture(section, "InternLMForCausalLM" if "bias" in section.values else "LlamaForCausalLM")
    tower = tower_name(section.text("mm_vision_tower"))
    vision, contrastive = _parse_tower(tower, section.values.get("vision_tower_config"))
    visual_size = vision.hidden_size if contrastive is None else contrastive.llm.hidden_size
    if section.size("mm_hidden_size", visual_size) != visual_size:
        raise ConfigError(f"config.json: `mm_hidden_size` is {section.values['mm_hidden_size']}, {tower} {visual_size}")
    kind = section.text("mm_projector_type", "linear")
    known = "two_mlp" if contrastive is not None else r"linear|mlp([1-9])x_gelu(_?ln)?"
    found = re.fullmatch(known, kind)
    if found is None:
        raise ConfigError(f"config.json: unknown mm_projector_type {kind!r} beside {tower}; known: {known}")
    depth, norm = (None, None) if contrastive is not None else found.groups()
    return LlavaConfig(
        vision=vision,
        llm=llm,
        template="vicuna_v1",
        system_message=None,
        select_layer=section.integer("mm_vision_select_layer"),
        downsample_ratio=1.0,
        ps_version="v2",
        tile_size=448 if "448" in tower else 336,
        dynamic_image_size=False,
        use_thumbnail=False,
        min_dynamic_patch=1,
        max_dynamic_patch=1,
        pad2square=section.choice("image_aspect_ratio", ("pad", "square"), "square") == "pad",
        tower=tower,
        projector_depth=2 if contrastive is not None else int(depth or 1),
        projector_norm=norm is not None,
        keeps_class_token=section.choice("mm_vision_select_feature", ("patch", "cls_patch"), "patch") == "cls_patch",
        contrastive=contrastive,
    )


_INTERNVIT_6B = VisionConfig(3200, 25, 12800, 48, 224, 14, False, True, "rms_norm", 1e-6)
_QLLAMA = DecoderConfig(
    *("LlamaForCausalLM", 49954, 4096, 11008, 32, 32, 32, 128, 1e-6, 10000.0, None, 2048, False, False, False, False)
)
_INTERNVL_14B = ContrastiveConfig(_INTERNVIT_6B, _QLLAMA, 768, 16, 96, 2)


def _parse_tower(name: str, values: Any) -> tuple[VisionConfig, ContrastiveConfig | None]:
    """The vision half that LLaVA's form names, by its own `config.json` or else by the released ones' names."""
    if values is not None:
        config = parse_any_config(values)
        if isinstance(config, InternVLConfig):
            raise ConfigError(f"{name}: a chat model cannot be the vision half of another")
        return (config, None) if isinstance(config, VisionConfig) else (config.vision, config)
    plain = name.lower().replace("_", "-")
    if re.fullmatch("intern-?vl-?14b-224px", plain):
        return _INTERNVIT_6B, _INTERNVL_14B
    found = re.fullmatch("intern-?vit-?6b-(?:(224)px|448px(?:-v(?:1-0|(1-2|1-5|2-5)))?)", plain)
    if found is None:
        raise ConfigError(
            f"config.json: unknown mm_vision_tower {name!r}; known: InternViT-6B-224px, InternViT-6B-448px-V1-0, "
            "-V1-2, -V1-5 and -V2-5, InternVL-14B-224px, and any whose folder lies, with its config.json, in this one"
        )
    size, depth = 224 if found[1] else 448, 45 if found[2] else 48
    return replace(_INTERNVIT_6B, image_size=size, num_hidden_layers=depth), None


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
        if values.get("original_c"):
            whole = parse_contrastive_config(values) if "qllama_config" in values else _INTERNVL_14B
            return replace(whole, num_query_tokens=0)
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
    """`config.json` with what the files beside it add."""
    if isinstance(source, Mapping):
        return source
    folder = Path(source)
    if (folder / ORIGINAL_C).is_file() and not (folder / "config.json").exists():
        return {"original_c": True}
    values = _read_json(folder / "config.json")
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.json: expected an object, found {type(values).__name__}")
    if "text_config" in values:
        if (folder / "preprocessor_config.json").is_file():
            return {**values, "preprocessor_config": _read_json(folder / "preprocessor_config.json")}
        if (folder / "processor_config.json").is_file():  # where transformers writes it since version 5
            processor = _read_json(folder / "processor_config.json")
            images = processor.get("image_processor") if isinstance(processor, Mapping) else processor
            return {**values, "preprocessor_config": images}
    tower = values.get("mm_vision_tower")
    if isinstance(tower, str) and (folder / tower_name(tower) / "config.json").is_file():
        return {**values, "vision_tower_config": _read_json(folder / tower_name(tower) / "config.json")}
    return values


def tower_name(tower: str) -> str:
    """The last part of `mm_vision_tower`, a path or a name: the whole would let a checkpoint read other files."""
    return tower.rstrip("/").rpartition("/")[2].lstrip(".") or "unnamed"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not valid JSON") from None
