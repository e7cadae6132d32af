"""Configs of chat models in other forms than the official one: transformers' own, and LLaVA's of InternVL-Chat 1.0."""

import json
from pathlib import Path
from typing import Any

import pytest

from vitrail.runtime.config import (
    ContrastiveConfig,
    InternVLConfig,
    LlavaConfig,
    VisionConfig,
    load_any_config,
    load_config,
    parse_any_config,
    parse_config,
)
from vitrail.runtime.errors import ConfigError
from vitrail.runtime.weights import expected_tensors

from ..official_configs import (
    INTERNVIT_6B_224PX,
    INTERNVL3_1B_HF,
    INTERNVL_14B_224PX,
    INTERNVL_CHAT_VICUNA_7B,
    INTERNVL_CHAT_VICUNA_13B_448PX,
    INTERNVL_CHAT_VICUNA_QLLAMA,
    PREPROCESSOR_HF,
    QWEN2_0_5B,
    chat,
)
from ..official_configs import INTERNVIT_300M as VISION_300M


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def text(**changes: Any) -> dict[str, Any]:
    return INTERNVL3_1B_HF | {"text_config": INTERNVL3_1B_HF["text_config"] | changes}


def vision(**changes: Any) -> dict[str, Any]:
    return INTERNVL3_1B_HF | {"vision_config": INTERNVL3_1B_HF["vision_config"] | changes}


# transformers' form


def test_the_transformers_form_is_the_official_model_under_other_names(tmp_path: Path) -> None:
    official = parse_config(
        chat(VISION_300M, QWEN2_0_5B | {"vocab_size": 151674}, template="internvl2_5", max_dynamic_patch=12)
    )
    native = load_config(write(tmp_path, config=INTERNVL3_1B_HF, preprocessor_config=PREPROCESSOR_HF))
    assert native.layout == "transformers"
    assert native.vision == official.vision
    assert native.llm == official.llm
    same = ("template", "system_message", "select_layer", "downsample_ratio", "ps_version", "tile_size")
    same += ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch", "pad2square")
    for field in same:
        assert getattr(native, field) == getattr(official, field), field


def test_the_transformers_form_has_three_tensors_for_each_qkv() -> None:
    expected = expected_tensors(INTERNVL3_1B_HF)
    assert len(expected) == 637 + 24 * (6 - 2)
    assert expected["vision_tower.encoder.layer.23.attention.v_proj.bias"] == (1024,)
    assert expected["vision_tower.embeddings.position_embeddings"] == (1, 1025, 1024)
    assert expected["multi_modal_projector.linear_1.weight"] == (896, 4096)
    assert expected["language_model.lm_head.weight"] == (151674, 896)


def test_rotary_settings_are_read_as_either_version_of_transformers_writes_them() -> None:
    plain = {key: value for key, value in text()["text_config"].items() if key != "rope_theta"}
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}
    newer = parse_config(INTERNVL3_1B_HF | {"text_config": plain | {"rope_parameters": scaled}}).llm
    older = parse_config(text(rope_theta=5e5, rope_scaling={"rope_type": "dynamic", "factor": 2.0})).llm
    assert newer == older
    assert newer.rope_theta == 5e5
    assert newer.rope_scaling is not None
    assert newer.rope_scaling.factor == 2.0


@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor_config", "processor_config"])
def test_the_image_processor_says_how_images_are_cut(nested: bool, tmp_path: Path) -> None:
    images = PREPROCESSOR_HF | {"size": {"height": 336, "width": 336}, "min_patches": 2, "max_patches": 6}
    files = {"processor_config": {"image_processor": images}} if nested else {"preprocessor_config": images}
    config = load_config(write(tmp_path, config=INTERNVL3_1B_HF, **files))
    assert (config.tile_size, config.min_dynamic_patch, config.max_dynamic_patch) == (336, 2, 6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (text(model_type="qwen3_moe"), "text_config: `model_type` is 'qwen3_moe'; known: llama, qwen2, qwen3"),
        (text(model_type="gpt_oss"), "`model_type` is 'gpt_oss'"),
        (text(model_type=None), "text_config: `model_type` is missing"),
        (vision(use_mean_pooling=False), "`use_mean_pooling` False is not supported"),
        (vision(use_mask_token=True), "`use_mask_token` True is not supported"),
        (vision(use_absolute_position_embeddings=False), "`use_absolute_position_embeddings` False"),
        (vision(image_size=[448, 224]), r"`image_size` is \[448, 224\]; only squares"),
        (INTERNVL3_1B_HF | {"projector_hidden_act": "relu"}, "`projector_hidden_act` is 'relu'; known: gelu"),
        (INTERNVL3_1B_HF | {"vision_feature_select_strategy": "full"}, "is 'full'; known: default"),
        (INTERNVL3_1B_HF | {"preprocessor_config": {"image_mean": [0.5, 0.5, 0.5]}}, "`image_mean` is"),
        (INTERNVL3_1B_HF | {"preprocessor_config": {"size": {"height": 448, "width": 336}}}, "448x336; only squares"),
    ],
)
def test_what_is_unknown_of_the_transformers_form_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(given)


# LLaVA's form


def test_internvl_chat_1_0_is_read_from_llavas_entries() -> None:
    config = parse_any_config(INTERNVL_CHAT_VICUNA_7B)
    assert isinstance(config, LlavaConfig)
    assert config.vision == parse_any_config(INTERNVIT_6B_224PX)
    assert (config.llm.hidden_size, config.llm.vocab_size, config.llm.qkv_bias) == (4096, 32000, False)
    assert (config.template, config.select_layer, config.vision_depth) == ("vicuna_v1", -4, 45)
    assert (config.tile_size, config.tokens_per_tile, config.dynamic_image_size) == (336, 576, False)
    assert (config.pad2square, config.projector_depth, config.projector_norm) == (True, 2, False)
    assert (config.keeps_class_token, config.contrastive, config.context_token) == (False, None, "<unk>")


def test_the_448_pixel_checkpoint_has_1024_visual_tokens() -> None:
    config = parse_config(INTERNVL_CHAT_VICUNA_13B_448PX)
    assert (config.tile_size, config.tokens_per_tile, config.vision.image_size) == (448, 1024, 448)
    assert (config.vision.num_hidden_layers, config.vision_depth) == (48, 45)


def test_with_qllama_96_queries_stand_before_576_patches() -> None:
    config = parse_config(INTERNVL_CHAT_VICUNA_QLLAMA)
    assert isinstance(config, LlavaConfig)
    assert config.contrastive == parse_any_config(INTERNVL_14B_224PX)
    assert (config.tokens_per_tile, config.vision_depth, config.feature_layer) == (672, 48, 45)


def test_full_size_checkpoints_of_internvl_chat_1_0_have_their_tensors() -> None:
    vicuna = expected_tensors(INTERNVL_CHAT_VICUNA_7B)
    assert len(vicuna) == (4 + 48 * 13) + 4 + (3 + 32 * 9)
    assert vicuna["model.mm_projector.0.weight"] == (4096, 3200)
    assert vicuna["model.mm_projector.2.bias"] == (4096,)
    assert vicuna["model.vision_tower.vision_tower.embeddings.position_embedding"] == (1, 257, 3200)
    assert vicuna["lm_head.weight"] == (32000, 4096)
    qllama = expected_tensors(INTERNVL_CHAT_VICUNA_QLLAMA)
    assert len(qllama) == (4 + 48 * 13) + (1 + 32 * 9 + 16 * 6) + 1 + 8 + (3 + 32 * 9)
    assert qllama["model.mm_projector.mlp1.0.weight"] == (4096, 3200)
    assert qllama["model.mm_projector.mlp2.0.weight"] == (4096, 4096)
    assert qllama["model.vision_tower.vision_tower.qllama.model.layers.30.cross_attn.k_proj.weight"] == (4096, 3200)
    biased = expected_tensors(INTERNVL_CHAT_VICUNA_7B | {"bias": True})  # InternLM-7B
    assert len(biased) == len(vicuna) + 32 * 4
    assert biased["model.layers.31.self_attn.o_proj.bias"] == (4096,)


@pytest.mark.parametrize(
    ("tower", "image_size", "blocks", "tile_size"),
    [
        ("OpenGVLab/InternViT-6B-224px", 224, 48, 336),
        ("./pretrained/intern_vit_6b_224px/", 224, 48, 336),
        ("./pretrained/intern_vit_6b_448px", 448, 48, 448),
        ("OpenGVLab/InternViT-6B-448px-V1-0", 448, 48, 448),
        ("./pretrained/intern_vit_6b_448px_v1_2", 448, 45, 448),
        ("OpenGVLab/InternViT-6B-448px-V1-5", 448, 45, 448),
    ],
)
def test_a_vision_half_is_known_by_its_name(tower: str, image_size: int, blocks: int, tile_size: int) -> None:
    config = parse_config(INTERNVL_CHAT_VICUNA_7B | {"mm_vision_tower": tower})
    assert (config.vision.image_size, config.vision.num_hidden_layers) == (image_size, blocks)
    assert config.tile_size == tile_size


def test_a_vision_half_beside_the_checkpoint_speaks_for_itself(tmp_path: Path) -> None:
    write(tmp_path, config=INTERNVL_CHAT_VICUNA_7B | {"mm_vision_tower": "../somewhere/mine-6b", "mm_hidden_size": 64})
    (tmp_path / "mine-6b").mkdir()
    write(tmp_path / "mine-6b", config=INTERNVIT_6B_224PX | {"hidden_size": 64, "num_attention_heads": 4})
    config = load_any_config(tmp_path)
    assert isinstance(config, LlavaConfig)
    assert config.vision.hidden_size == 64
    assert config.tower == "mine-6b"


@pytest.mark.parametrize("tower", ["..", "/", "a/..", ""])
def test_the_name_of_a_vision_half_leads_out_of_no_folder(tower: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    write(tmp_path, config=INTERNVIT_6B_224PX)
    write(inside, config=INTERNVL_CHAT_VICUNA_7B | {"mm_vision_tower": tower})
    with pytest.raises(ConfigError, match="unknown mm_vision_tower"):
        load_any_config(inside)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, r"unknown architectures \['LlavaMptForCausalLM'\]"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "unknown mm_vision_tower 'clip-vit-large-patch14"),
        ({"mm_use_im_start_end": True}, "`mm_use_im_start_end` true is not supported"),
        ({"mm_projector_type": "identity"}, "unknown mm_projector_type 'identity' beside intern_vit_6b_224px"),
        ({"mm_projector_type": "two_mlp"}, "unknown mm_projector_type 'two_mlp'"),
        ({"mm_vision_tower": "internvl_14b_224px", "mm_hidden_size": 4096}, "'mlp2x_gelu' beside internvl_14b_224px"),
        ({"mm_hidden_size": 1024}, "`mm_hidden_size` is 1024, intern_vit_6b_224px 3200"),
        ({"image_aspect_ratio": "anyres"}, "`image_aspect_ratio` is 'anyres'; known: pad, square"),
        ({"mm_vision_select_feature": "all"}, "`mm_vision_select_feature` is 'all'"),
        ({"mm_vision_select_layer": None}, "`mm_vision_select_layer` is missing"),
        ({"vision_tower_config": INTERNVL3_1B_HF}, "a chat model cannot be the vision half"),
    ],
)
def test_what_is_unknown_of_llavas_form_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(INTERNVL_CHAT_VICUNA_7B | changes)


def test_each_kind_of_config_is_told_from_the_others() -> None:
    kinds = {
        "INTERNVL3_1B_HF": (INTERNVL3_1B_HF, InternVLConfig),
        "INTERNVL_14B_224PX": (INTERNVL_14B_224PX, ContrastiveConfig),
        "INTERNVIT_6B_224PX": (INTERNVIT_6B_224PX, VisionConfig),
        "INTERNVL_CHAT_VICUNA_7B": (INTERNVL_CHAT_VICUNA_7B, LlavaConfig),
    }
    for name, (values, kind) in kinds.items():
        assert type(parse_any_config(values)) is kind, name
