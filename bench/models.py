"""Official shapes with random weights: time does not depend on the weights' values."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from vitrail.runtime.config import ContrastiveConfig, InternVLConfig
from vitrail.runtime.kernel_pack import GEOMETRIES, INTERNLM2_20B, INTERNVIT_6B
from vitrail.runtime.models.internvl import InternVLModel

Module = TypeVar("Module", bound=nn.Module)

INTERNVL_CHAT_V1_5 = GEOMETRIES["InternVL-Chat-V1-5"]
INTERNVL2_5_1B = GEOMETRIES["InternVL2_5-1B"]
# InternVL-14B-224px: InternVL-C and InternVL-G.
INTERNVL_14B = ContrastiveConfig(
    vision=replace(INTERNVIT_6B, num_hidden_layers=48, image_size=224),
    llm=replace(
        INTERNLM2_20B,
        architecture="LlamaForCausalLM",
        vocab_size=49954,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=2048,
    ),
    embed_dim=768,
    pool_heads=16,
    num_query_tokens=96,
    cross_attention_frequency=2,
)


def vision_only(config: InternVLConfig) -> InternVLConfig:
    """The model with next to no language half, for measuring its vision half."""
    return replace(config, llm=replace(config.llm, num_hidden_layers=1, intermediate_size=64, vocab_size=64))


def language_only(config: InternVLConfig) -> InternVLConfig:
    """The model with one block of its vision half, for measuring its language half."""
    return replace(config, vision=replace(config.vision, num_hidden_layers=1), select_layer=-1)


def random_model(config: InternVLConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> InternVLModel:
    """A model of that shape, made where it will run."""
    with torch.device("meta"):
        model = InternVLModel(config).to(dtype)
    return randomize(model.to_empty(device=device))


def randomize(model: Module) -> Module:
    """Random weights, scaled so that activations stay finite through all layers."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.5)
    return model.eval()
