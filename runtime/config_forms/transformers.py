"""InternVL in transformers' own form (`model_type: internvl` with a `text_config`), of repositories that end in -hf."""

from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from ..model_config import InternVLConfig, VisionConfig
from .decoder import parse_decoder
from .section import Section

# Language models that the transformers-native form is known to have; InternLM2's are LLaMAs there.
_TEXT_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_IMAGE_MEAN, _IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parse_transformers(section: Section) -> InternVLConfig:
    """A chat model of InternVL2.5 or later, since the form has no older ones: one template, one way to tile."""
    text = Section(section.values.get("text_config"), "text_config")
    architecture = _TEXT_MODELS[text.choice("model_type", tuple(_TEXT_MODELS))]
    section.choice("projector_hidden_act", ("gelu",), "gelu")
    section.choice("vision_feature_select_strategy", ("default",), "default")
    vision = _parse_vision(section.values.get("vision_config"))
    processor = Section(section.values.get("preprocessor_config") or {}, "preprocessor_config.json")
    for key, expected in (("image_mean", _IMAGE_MEAN), ("image_std", _IMAGE_STD)):
        if key in processor.values and processor.numbers(key, 3) != expected:
            raise ConfigError(f"{processor.name}: `{key}` is {processor.values[key]}; known: {list(expected)}")
    # True is the default of the form as a whole, and defaults are not always written down.
    tied = section.flag("tie_word_embeddings", text.flag("tie_word_embeddings", True))
    return InternVLConfig(
        vision=vision,
        llm=replace(parse_decoder(text, architecture), tie_word_embeddings=tied),
        template="internvl2_5",
        system_message=None,
        select_layer=section.integer("vision_feature_layer", -1),
        downsample_ratio=section.number("downsample_ratio", 0.5),
        ps_version="v2",
        tile_size=_square(Section(processor.values.get("size") or {}, f"{processor.name}.size"), vision.image_size),
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=processor.size("min_patches", 1),
        max_dynamic_patch=processor.size("max_patches", 12),
        pad2square=False,
        layout="transformers",
    )


def _parse_vision(values: Any) -> VisionConfig:
    section = Section(values, "vision_config")
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


def _side(section: Section, key: str) -> int:
    """A size that stands there as one number or as a pair of equal ones."""
    pair = section.values.get(key)
    if not isinstance(pair, list):
        return section.size(key)
    if len(pair) != 2 or pair[0] != pair[1]:
        raise ConfigError(f"{section.name}: `{key}` is {pair}; only squares are supported")
    return Section({key: pair[0]}, section.name).size(key)


def _square(size: Section, default: int) -> int:
    """The side that an image processor's {height, width} has."""
    height, width = size.size("height", default), size.size("width", default)
    if height != width:
        raise ConfigError(f"{size.name}: {height}x{width}; only squares are supported")
    return height
