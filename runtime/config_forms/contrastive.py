"""InternVL-C and -G (`model_type: internvl` with a `qllama_config`)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from ..model_config import ContrastiveConfig, DecoderConfig, VisionConfig
from .decoder import parse_decoder
from .official import parse_vision
from .section import Section

# InternVL-14B-224px, as released: for checkpoints that only name it.
INTERNVIT_6B = VisionConfig(3200, 25, 12800, 48, 224, 14, False, True, "rms_norm", 1e-6)
_QLLAMA = DecoderConfig(
    *("LlamaForCausalLM", 49954, 4096, 11008, 32, 32, 32, 128, 1e-6, 10000.0, None, 2048, False, False, False, False)
)
INTERNVL_14B = ContrastiveConfig(INTERNVIT_6B, _QLLAMA, 768, 16, 96, 2)


def parse_contrastive_config(values: Mapping[str, Any]) -> ContrastiveConfig:
    """Read an official InternVL-C/G `config.json`, already decoded. Raises `ConfigError` naming the entry."""
    section = Section(values, "config.json")
    for key in ("use_backbone_lora", "use_qllama_lora"):
        if section.values.get(key):
            raise ConfigError(f"config.json: `{key}` is {section.values[key]}; merge the LoRA weights first")
    vision = parse_vision(section.values.get("vision_config"))
    return ContrastiveConfig(
        # A checkpoint tuned at another size stores the positions of that size, whatever its vision_config says.
        vision=replace(vision, image_size=section.size("force_image_size", vision.image_size)),
        llm=parse_decoder(Section(section.values.get("qllama_config"), "qllama_config"), "LlamaForCausalLM"),
        embed_dim=section.size("clip_embed_dim", 768),
        pool_heads=section.size("attn_pool_num_heads", 16),
        num_query_tokens=section.size("num_query_token", 96),
        cross_attention_frequency=section.size("cross_attention_frequency", 2),
    )


def parse_original_c(values: Mapping[str, Any]) -> ContrastiveConfig:
    """InternVL-C alone, as its original file holds it: of the released size, or of `values` where they say one."""
    whole = parse_contrastive_config(values) if "qllama_config" in values else INTERNVL_14B
    return replace(whole, num_query_tokens=0)
