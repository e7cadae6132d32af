"""Random tiny checkpoints in the official formats of InternVL-Chat, of its version 1.0 and of InternVL-C/G.

Weights have the scale of trained ones (activations neither vanish nor explode), and nothing is neutral: norm weights
and LayerScale are not 1, biases are not 0, so that a part that is skipped, swapped or doubled shows in the output.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitrail.runtime.config import ModelConfig, parse_config, parse_contrastive_config
from vitrail.runtime.models.contrastive import ContrastiveModel
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.weights import build_model, expected_tensors

INTERNVIT_6B = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
INTERNVIT_300M = {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}

# What each architecture's config.json has beside the sizes. Phi-3: head_dim 16, so 8 factors.
_LLM_FIELDS: dict[str, dict[str, Any]] = {
    "InternLM2ForCausalLM": {"bias": False},
    "InternLMForCausalLM": {"bias": True},
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"rope_theta": 1000000.0},
    "Qwen3ForCausalLM": {"rope_theta": 1000000.0, "head_dim": 24},
    "Phi3ForCausalLM": {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 32,
        "sliding_window": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
            "long_factor": [1.1, 1.4, 2.0, 3.0, 4.5, 6.0, 7.0, 8.0],
        },
    },
}
ARCHITECTURES = tuple(_LLM_FIELDS)


def chat_config(
    architecture: str = "InternLM2ForCausalLM",
    vision: Mapping[str, Any] | None = None,
    llm: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A decoded `config.json`: three InternViT blocks on 6x6 patches, three decoder layers, 4 query and 2 KV heads."""
    return {
        "model_type": "internvl_chat",
        "template": "internlm2-chat",
        "ps_version": "v2",
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "vision_config": {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "image_size": 84,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
            **INTERNVIT_6B,
            **(vision or {}),
        },
        "llm_config": {
            "architectures": [architecture],
            "vocab_size": 509,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 512,
            **_LLM_FIELDS[architecture],
            **(llm or {}),
        },
        **changes,
    }


def contrastive_config(
    vision: Mapping[str, Any] | None = None, llm: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A decoded `config.json` of InternVL-C/G: the ViT of `chat_config`, four QLLaMA layers, six queries."""
    chat = chat_config("LlamaForCausalLM", vision, llm)
    qllama = {**chat["llm_config"], "num_hidden_layers": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    return {
        "model_type": "internvl",
        "architectures": ["InternVLModel"],
        "clip_embed_dim": 20,
        "attn_pool_num_heads": 4,
        "num_query_token": 6,
        "cross_attention_frequency": 2,
        "vision_config": chat["vision_config"],
        "qllama_config": qllama | dict(llm or {}),
        **changes,
    }


def llava_config(qllama: bool = False, **changes: Any) -> dict[str, Any]:
    """A decoded `config.json` of InternVL-Chat 1.0: the halves of `chat_config`, the ViT's as of a folder beside it."""
    chat = chat_config("LlamaForCausalLM", llm={"num_key_value_heads": 4, "max_position_embeddings": 1024})
    tower = contrastive_config() if qllama else chat["vision_config"] | {"model_type": "intern_vit_6b"}
    return {
        **chat["llm_config"],
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": "towers/tiny-84px",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "two_mlp" if qllama else "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "vision_tower_config": tower,
        **changes,
    }


def random_weights(config: Mapping[str, Any] | ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of this config holds, fp32, under its official name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator) for name, shape in expected_tensors(config).items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith((".ls1", ".ls2")):
        return torch.empty(shape).uniform_(-1.0, 1.0, generator=generator)
    if len(shape) == 1 and name.endswith("weight"):  # of a norm
        return torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
    values = torch.randn(shape, generator=generator)
    if name.endswith(("tok_embeddings.weight", "embed_tokens.weight", "query_tokens", "logit_scale")):
        return values
    if name.endswith(("bias", "class_embedding", "position_embedding")):
        return values * 0.3
    return values / math.sqrt(math.prod(shape[1:]))


def random_tiles(count: int, side: int, seed: int = 0) -> Tensor:
    """(count, side, side, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)


def build(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> InternVLModel:
    """The model on the CPU."""
    return build_model(parse_config(config), weights.items(), dtype=dtype, device=torch.device("cpu"))


def build_contrastive(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> ContrastiveModel:
    """The model on the CPU."""
    model = build_model(parse_contrastive_config(config), weights.items(), dtype=dtype, device=torch.device("cpu"))
    assert isinstance(model, ContrastiveModel)
    return model


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    shards: int = 1,
    suffix: str = ".safetensors",
) -> None:
    """Write `config.json` and the weights, as one file or as `shards` files with an index; tensors dealt in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    if shards == 1:
        _save(folder / f"{stem}{suffix}", weights)
        return
    names = list(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}{suffix}"
        part = {name: weights[name] for name in names[shard::shards]}
        weight_map |= dict.fromkeys(part, file)
        _save(folder / file, part)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def _save(path: Path, weights: Mapping[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(dict(weights), path, metadata={"format": "pt"})
    else:
        torch.save(dict(weights), path)
