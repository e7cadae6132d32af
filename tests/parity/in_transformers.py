"""The same random checkpoints as transformers' models: our official names mapped to its names, written out here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

IMAGE_TOKEN = 508

_LANGUAGE_MODELS = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM),
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3ForCausalLM),
    "Phi3ForCausalLM": (Phi3Config, Phi3ForCausalLM),
}
_VISION_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
_VISION_EMBEDDINGS = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.weight": "patch_embeddings.projection.weight",
    "patch_embedding.bias": "patch_embeddings.projection.bias",
}
_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def internvl(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> InternVLForConditionalGeneration:
    """A whole chat model. Its LLM must be one that the port supports under the checkpoint's own names."""
    vision = config["vision_config"]
    native = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision["hidden_size"],
            num_attention_heads=vision["num_attention_heads"],
            intermediate_size=vision["intermediate_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            layer_norm_eps=vision["layer_norm_eps"],
            norm_type=vision["norm_type"],
            use_qk_norm=vision["qk_normalization"],
            attention_bias=vision["qkv_bias"],
        ),
        text_config=_language_config(config["llm_config"]),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=config["select_layer"],
        tie_word_embeddings=False,
    )
    state = {}
    for name, tensor in weights.items():
        state |= _native_names(name, tensor)
    return _load(InternVLForConditionalGeneration, native, state)


def language_model(llm_config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The language half alone; weights of the vision half are left out."""
    _, model_class = _LANGUAGE_MODELS[llm_config["architectures"][0]]
    prefix = "language_model."
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return _load(model_class, _language_config(llm_config), state)


def pixel_values(tiles: Tensor) -> Tensor:
    """(n, 3, side, side) fp32 of uint8 tiles: (u8 / 255 - mean) / std."""
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    return ((tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _language_config(llm: Mapping[str, Any]) -> Any:
    config_class, _ = _LANGUAGE_MODELS[llm["architectures"][0]]
    scaling = dict(llm.get("rope_scaling") or {"type": "default"})
    rope = {"rope_type": scaling.pop("type"), "rope_theta": llm["rope_theta"], **scaling}
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    optional = ("head_dim", "attention_bias", "original_max_position_embeddings")
    fields = {key: llm[key] for key in same} | {key: llm[key] for key in optional if key in llm}
    return config_class(**fields, rope_parameters=rope, tie_word_embeddings=False, pad_token_id=None)


def _native_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One official tensor under transformers' names; the ViT's `qkv` becomes three."""
    part, _, rest = name.partition(".")
    if part == "mlp1":
        layer, _, kind = rest.partition(".")
        return {f"model.multi_modal_projector.{_PROJECTOR[layer]}.{kind}": tensor}
    if part == "language_model":
        return {rest if rest.startswith("lm_head") else f"model.language_model.{rest.removeprefix('model.')}": tensor}
    if rest.startswith("embeddings."):
        return {f"model.vision_tower.embeddings.{_VISION_EMBEDDINGS[rest.removeprefix('embeddings.')]}": tensor}
    layer, _, key = rest.removeprefix("encoder.layers.").partition(".")
    block = f"model.vision_tower.encoder.layer.{layer}"
    if key.startswith("attn.qkv."):
        kind = key.removeprefix("attn.qkv.")
        return {f"{block}.attention.{x}_proj.{kind}": rows for x, rows in zip("qkv", tensor.chunk(3), strict=True)}
    stem = key.removesuffix(".weight").removesuffix(".bias")
    return {f"{block}.{_VISION_BLOCK[stem]}{key.removeprefix(stem)}": tensor}


def _load(model_class: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    # Eager attention: written-out products and softmax, so that the two sides do not share a fused kernel.
    config._attn_implementation = "eager"
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.load_state_dict(dict(state), strict=True)
    return model.eval().requires_grad_(False)
