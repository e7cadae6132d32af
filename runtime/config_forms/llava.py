"""LLaVA's form, InternVL-Chat 1.0 (`mm_vision_tower`), whose file says no more of its vision half than the name."""

import re
from dataclasses import replace

from ..errors import ConfigError
from ..model_config import ContrastiveConfig, InternVLConfig, LlavaConfig, ModelConfig, VisionConfig
from .contrastive import INTERNVIT_6B, INTERNVL_14B
from .decoder import parse_decoder
from .section import Section


def parse_llava(section: Section, stored: ModelConfig | None) -> LlavaConfig:
    """The language model's own entries, and `mm_*` ones of the vision half and the projector.

    stored: the vision half, where its `config.json` came with the checkpoint.
    """
    architectures = section.values.get("architectures")
    if architectures != ["LlavaLlamaForCausalLM"]:
        raise ConfigError(f"config.json: unknown architectures {architectures}; known: ['LlavaLlamaForCausalLM']")
    if section.flag("mm_use_im_start_end", False):
        raise ConfigError("config.json: `mm_use_im_start_end` true is not supported")
    # InternLM calls its biases `bias`, LLaMA `attention_bias`.
    llm = parse_decoder(section, "InternLMForCausalLM" if "bias" in section.values else "LlamaForCausalLM")
    tower = tower_name(section.text("mm_vision_tower"))
    vision, contrastive = _vision_half(tower, stored)
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


def tower_name(tower: str) -> str:
    """The last part of `mm_vision_tower`, a path or a name: the whole would let a checkpoint read other files."""
    return tower.rstrip("/").rpartition("/")[2].lstrip(".") or "unnamed"


def _vision_half(name: str, stored: ModelConfig | None) -> tuple[VisionConfig, ContrastiveConfig | None]:
    """The vision half of that name, as stored or else as released."""
    if isinstance(stored, InternVLConfig):
        raise ConfigError(f"{name}: a chat model cannot be the vision half of another")
    if stored is not None:
        return (stored, None) if isinstance(stored, VisionConfig) else (stored.vision, stored)
    plain = name.lower().replace("_", "-")
    if re.fullmatch("intern-?vl-?14b-224px", plain):
        return INTERNVIT_6B, INTERNVL_14B
    found = re.fullmatch("intern-?vit-?6b-(?:(224)px|448px(?:-v(?:1-0|(1-2|1-5|2-5)))?)", plain)
    if found is None:
        raise ConfigError(
            f"config.json: unknown mm_vision_tower {name!r}; known: InternViT-6B-224px, InternViT-6B-448px-V1-0, "
            "-V1-2, -V1-5 and -V2-5, InternVL-14B-224px, and any whose folder lies, with its config.json, in this one"
        )
    size, depth = 224 if found[1] else 448, 45 if found[2] else 48
    return replace(INTERNVIT_6B, image_size=size, num_hidden_layers=depth), None
