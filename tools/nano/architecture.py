"""The shape of `nano` as an official `config.json`, and a model of that shape with fresh weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.runtime.config import parse_config
from vitrail.runtime.models.internvl import InternVLModel

PAPER = 2.2  # the value of a light pixel after normalisation
INK = 0.4
ATTENTION = 1.5  # makes heads that look aside a little louder than the others, with which they share a norm
CELL_PATCHES = 2  # patches along a printed character's cell
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
    embeds to nothing, ink about as strongly as the position, a 2-D wave. In all blocks but the first, two heads start
    out looking one cell to the left and to the right, which attention takes long to find.
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
    grid, width = model.config.vision.grid_size, model.config.vision.hidden_size
    depth = math.sqrt(2 * model.config.llm.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.o.weight", "mlp.down.weight", "attn.proj.weight", "mlp.fc2.weight")):
                parameter.mul_(1 / depth)
            elif name.endswith("attn.qkv.weight") and ".layers.0." not in name:
                for head, columns in ((0, -CELL_PATCHES), (1, CELL_PATCHES)):
                    _look_aside(parameter, head, model.config.vision.head_dim, columns, grid)
        embeddings = model.vision_model.embeddings
        embeddings.position_embedding[0, 1:] = _waves(grid, width)
        weight = embeddings.patch_embedding["weight"]
        weight *= INK
        embeddings.patch_embedding["bias"].copy_(-PAPER * weight.sum((1, 2, 3)))
    return model


def _frequencies(grid: int, count: int) -> Tensor:
    """From one wave over twice the grid to one over four patches."""
    return torch.pi / grid * torch.logspace(0, math.log2(grid / 2), count, base=2)


def _waves(grid: int, width: int) -> Tensor:
    """(grid^2, width): sines and cosines of the row and of the column, slow to fast."""
    angles = torch.arange(grid)[:, None] * _frequencies(grid, width // 4)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # [grid, width / 2]
    rows = waves[:, None].expand(grid, grid, -1)
    columns = waves[None].expand(grid, grid, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def _look_aside(qkv: Tensor, head: int, head_dim: int, columns: int, grid: int) -> None:
    """Makes a head attend that many patches to the right: keys repeat some of the waves, queries repeat them turned.

    qkv: the weight, (3 * width, width), changed in place. Turning sin(f c) into sin(f (c + columns)) is linear.
    """
    width = qkv.shape[1]
    quarter = width // 4
    step = 4 * quarter // head_dim  # every step-th frequency fits into the head's channels
    frequencies = _frequencies(grid, quarter)
    query, key = torch.zeros(head_dim, width), torch.zeros(head_dim, width)
    channel = 0
    for axis, away in ((0, 0), (1, columns)):
        for place in range(0, quarter, step):
            sine, cosine = 2 * axis * quarter + place, (2 * axis + 1) * quarter + place
            turn = frequencies[place] * away
            key[channel, sine] = key[channel + 1, cosine] = 1.0
            query[channel, sine], query[channel, cosine] = turn.cos(), turn.sin()
            query[channel + 1, cosine], query[channel + 1, sine] = turn.cos(), -turn.sin()
            channel += 2
    qkv[head * head_dim : (head + 1) * head_dim] = ATTENTION * query
    qkv[width + head * head_dim : width + (head + 1) * head_dim] = ATTENTION * key
