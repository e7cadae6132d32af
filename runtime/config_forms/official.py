"""InternVL-Chat as OpenGVLab publishes it (`model_type: internvl_chat`), and the vision half that its models share."""

from typing import Any

from ..errors import ConfigError
from ..model_config import DecoderConfig, InternVLConfig, VisionConfig
from .decoder import parse_decoder
from .section import Section

_ARCHITECTURES = (
    "InternLM2ForCausalLM",
    "LlamaForCausalLM",
    "InternLMForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
)


def parse_official(section: Section) -> InternVLConfig:
    """A chat model's `config.json`."""
    for key in ("use_backbone_lora", "use_llm_lora"):
        if section.values.get(key):
            raise ConfigError(f"config.json: `{key}` is {section.values[key]}; merge the LoRA weights first")
    vision = parse_vision(section.values.get("vision_config"))
    message = section.values.get("system_message")
    return InternVLConfig(
        vision=vision,
        llm=_parse_llm(section.values.get("llm_config")),
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


def parse_vision(values: Any) -> VisionConfig:
    """An InternViT's entries: a `vision_config`, or the `config.json` of one by itself."""
    section = Section(values, "vision_config")
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


def _parse_llm(values: Any) -> DecoderConfig:
    section = Section(values, "llm_config")
    architectures = section.values.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError("llm_config: `architectures` is missing; it says which language model this is")
    architecture = architectures[0]
    if architecture not in _ARCHITECTURES:
        raise ConfigError(f"llm_config: unknown architecture {architecture!r}; known: {', '.join(_ARCHITECTURES)}")
    return parse_decoder(section, architecture)
