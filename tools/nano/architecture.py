"""The shape of `nano` as an official `config.json`, and a model of that shape with fresh weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.runtime.config import parse_config
from vitrail.runtime.models.internvl import InternVLModel

PAPER = 2.2  # the value of a light pixel after normalisation
INK = 0.4
SYSTEM_MESSAGE = "You read small pictures."


def make_config(vocab_size: int, *, vit_width: int, vit_layers: int, llm_layers: int) -> dict[str, Any]:
    """`config.json` of a model with V1.5's architecture, small."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internlm2-chat",
        "system_message": SYSTEM_MESSAGE,
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "force_image_size": 224,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 2,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vit_width,
            "num_attention_heads": vit_width // 32,
            "intermediate_size": 4 * vit_width,
            "num_hidden_layers": vit_layers,
            "image_size": 224,
            "patch_size": 14,
            "num_channels": 3,
            "qkv_bias": False,
            "qk_normalization": True,
            "norm_type": "rms_norm",
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
        },
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "vocab_size": vocab_size,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": llm_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "bias": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
    }


def new_model(config: dict[str, Any]) -> InternVLModel:
    """A model with random weights that trains well.

    What decides how fast attention between cells is learned is that no part of a token drowns the others: blank paper
    embeds to nothing, ink about as strongly as the position, a 2-D wave.
    """
    model = InternVLModel(parse_config(config))
    for name, parameter in model.named_parameters():
        if "norm.weight" in name or "norm1.weight" in name or "norm2.weight" in name or name.endswith(("ls1", "ls2")):
            nn.init.ones_(parameter)
            if "q_norm" in name or "k_norm" in name:
                # unit queries and keys cannot attend sharply, and a norm's weight grows slowly
                parameter.data.fill_(1.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "embedding" in name and "patch" not in name:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
    depth = math.sqrt(2 * len(model.language_model.layers))
    with torch.no_grad():
        for layer in model.language_model.layers:
            layer.attention.o.weight /= depth
            layer.mlp.down.weight /= depth
        for block in model.vision_model.encoder.layers:
            block.attn.proj.weight /= depth
            block.mlp.fc2.weight /= depth
        embeddings = model.vision_model.embeddings
        grid, width = embeddings.config.grid_size, embeddings.config.hidden_size
        embeddings.position_embedding[0, 1:] = _waves(grid, width)
        weight = embeddings.patch_embedding["weight"]
        weight *= INK
        embeddings.patch_embedding["bias"].copy_(-PAPER * weight.sum((1, 2, 3)))
    return model


def _waves(grid: int, width: int) -> Tensor:
    """(grid^2, width): sines and cosines of the row and of the column, slow to fast."""
    frequencies = torch.pi / grid * torch.logspace(0, math.log2(grid / 2), width // 4, base=2)
    angles = torch.arange(grid)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # [grid, width / 2]
    rows = waves[:, None].expand(grid, grid, -1)
    columns = waves[None].expand(grid, grid, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)
