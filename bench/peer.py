"""transformers' InternVL port with the very tensors of a vitrail model: the contender of the side-by-side benchmarks.

Projections that vitrail keeps joined ([q | k | v], [gate | up]) are handed over as views of their rows, so that both
models stand in memory once. InternLM2 becomes the LLaMA it equals.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    InternVLConfig as PeerConfig,
)
from transformers import (
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
)

from vitrail.runtime.config import DecoderConfig
from vitrail.runtime.models.decoder import Decoder
from vitrail.runtime.models.intern_vit import InternViT
from vitrail.runtime.models.internvl import InternVLModel, Projector

_LANGUAGE_CONFIGS = {
    "InternLM2ForCausalLM": LlamaConfig,
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
}


def transformers_model(model: InternVLModel, image_token_id: int) -> Any:
    """The port of `model` with SDPA attention, its fastest on a CPU, sharing the weights."""
    vision, config = model.config.vision, model.config
    peer_config = PeerConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_attention_heads=vision.num_attention_heads,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=config.vision_depth,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
            norm_type=vision.norm_type,
            use_qk_norm=vision.qk_normalization,
            attention_bias=vision.qkv_bias,
        ),
        text_config=_language_config(config.llm),
        image_token_id=image_token_id,
        image_seq_length=config.tokens_per_tile,
        tie_word_embeddings=False,
    )
    state = {f"model.vision_tower.{name}": tensor for name, tensor in _vision_state(model.vision_model).items()}
    projector = cast(Projector, model.projector)
    for name, part in (
        ("layer_norm", projector.norm),
        ("linear_1", projector.linear_1),
        ("linear_2", projector.linear_2),
    ):
        for key, parameter in part.named_parameters():
            state[f"model.multi_modal_projector.{name}.{key}"] = parameter
    state |= _language_state(model.language_model)
    make: Any = InternVLForConditionalGeneration._from_config
    with torch.device("meta"):
        peer = make(peer_config, attn_implementation="sdpa")
    peer.load_state_dict(state, strict=True, assign=True)
    # Rotary frequencies are buffers that no state holds: made anew, off the meta device.
    rotary = peer.model.language_model.rotary_emb
    peer.model.language_model.rotary_emb = type(rotary)(peer_config.text_config).to(
        model.language_model.embedding.device
    )
    return peer.eval().requires_grad_(False)


def pixel_values(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 3, side, side) of uint8 tiles (n, side, side, 3), normalised as the port's image processor does."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=tiles.device)
    std = torch.tensor([0.229, 0.224, 0.225], device=tiles.device)
    return ((tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous().to(dtype)


def _language_config(llm: DecoderConfig) -> Any:
    return _LANGUAGE_CONFIGS[llm.architecture](
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_hidden_layers,
        num_attention_heads=llm.num_attention_heads,
        num_key_value_heads=llm.num_key_value_heads,
        rms_norm_eps=llm.rms_norm_eps,
        max_position_embeddings=llm.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _vision_state(vit: InternViT) -> dict[str, Tensor]:
    embeddings = vit.embeddings
    state: dict[str, Tensor] = {
        "embeddings.cls_token": embeddings.class_embedding,
        "embeddings.position_embeddings": embeddings.position_embedding,
        "embeddings.patch_embeddings.projection.weight": embeddings.patch_embedding["weight"],
        "embeddings.patch_embeddings.projection.bias": embeddings.patch_embedding["bias"],
    }
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.projection_layer",
        "attn.q_norm": "attention.q_norm",
        "attn.k_norm": "attention.k_norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for index, block in enumerate(vit.encoder.layers):
        parameters = dict(block.named_parameters())
        prefix = f"encoder.layer.{index}"
        state |= {f"{prefix}.lambda_{number}": parameters.pop(f"ls{number}") for number in (1, 2)}
        for name, parameter in parameters.items():
            stem, _, kind = name.rpartition(".")
            if stem == "attn.qkv":
                for letter, rows in zip("qkv", parameter.chunk(3), strict=True):
                    state[f"{prefix}.attention.{letter}_proj.{kind}"] = rows
            else:
                state[f"{prefix}.{names[stem]}.{kind}"] = parameter
    return state


def _language_state(decoder: Decoder) -> dict[str, Tensor]:
    config = decoder.config
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    state: dict[str, Tensor] = {
        "model.language_model.embed_tokens.weight": decoder.embedding,
        "model.language_model.norm.weight": decoder.norm.weight,
        "lm_head.weight": cast(Tensor, decoder.head.weight),
    }
    names = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.o": "self_attn.o_proj",
        "mlp.down": "mlp.down_proj",
    }
    for index, layer in enumerate(decoder.layers):
        prefix = f"model.language_model.layers.{index}"
        for name, parameter in layer.named_parameters():
            stem, _, kind = name.rpartition(".")
            if stem == "attention.qkv":
                for letter, rows in zip("qkv", parameter.split((q, kv, kv)), strict=True):
                    state[f"{prefix}.self_attn.{letter}_proj.{kind}"] = rows
            elif stem == "mlp.gate_up":
                for key, rows in zip(("gate", "up"), parameter.chunk(2), strict=True):
                    state[f"{prefix}.mlp.{key}_proj.{kind}"] = rows
            else:
                state[f"{prefix}.{names[stem]}.{kind}"] = parameter
    return state
