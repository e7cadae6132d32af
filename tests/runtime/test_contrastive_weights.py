"""Configuration and tensors of InternVL-14B (C and G) and of InternViT on its own."""

import json
import math
from copy import deepcopy

import pytest
import torch

from vitrail.runtime.config import load_any_config, parse_any_config, parse_contrastive_config
from vitrail.runtime.errors import CheckpointError, ConfigError
from vitrail.runtime.models.contrastive import ContrastiveModel
from vitrail.runtime.models.vision_tower import VisionTower
from vitrail.runtime.weights import expected_tensors, load_model, make_model

from ..official_configs import INTERNVIT_6B_224PX, INTERNVIT_300M, INTERNVL_14B_224PX, INTERNVL_CHAT_V1_5
from ..random_checkpoints import INTERNVIT_300M as TINY_300M
from ..random_checkpoints import chat_config, contrastive_config, random_weights, write_checkpoint

CPU = torch.device("cpu")


def parameters(config, prefix=""):
    return sum(math.prod(shape) for name, shape in expected_tensors(config).items() if name.startswith(prefix))


def changed(path, value):
    config = deepcopy(INTERNVL_14B_224PX)
    *parents, last = path
    section = config
    for key in parents:
        section = section[key]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return config


def load(folder):
    return load_model(folder, load_any_config(folder), dtype=torch.float32, device=CPU, progress=False)


# --- the official checkpoint ---


def test_internvl_14b_has_1048_tensors_and_13_8_billion_parameters():
    assert len(expected_tensors(INTERNVL_14B_224PX)) == 1048
    assert parameters(INTERNVL_14B_224PX, "vision_model.") == 5_902_793_600
    assert 13.83e9 < parameters(INTERNVL_14B_224PX) < 13.84e9
    c_only = parameters(INTERNVL_14B_224PX, "vision_model.") + parameters(INTERNVL_14B_224PX, "clip_projector.")
    qllama = {n: s for n, s in expected_tensors(INTERNVL_14B_224PX).items() if n.startswith("qllama.model.")}
    c_only += sum(math.prod(shape) for name, shape in qllama.items() if "cross_attn" not in name)
    assert 12.61e9 < c_only + 4096 * 768 < 12.63e9


def test_shapes_of_internvl_14b_are_the_published_ones():
    expected = expected_tensors(INTERNVL_14B_224PX)
    published = {
        "vision_model.embeddings.position_embedding": (1, 257, 3200),
        "vision_model.encoder.layers.47.attn.qkv.weight": (9600, 3200),
        "clip_projector.norm1_q.weight": (3200,),
        "clip_projector.norm1_k.bias": (3200,),
        "clip_projector.cross_attn.q.weight": (3200, 3200),
        "clip_projector.cross_attn.k_bias": (3200,),
        "clip_projector.cross_attn.proj.weight": (768, 3200),
        "clip_projector2.norm1_v.weight": (4096,),
        "clip_projector2.cross_attn.v.weight": (4096, 4096),
        "clip_projector2.cross_attn.v_bias": (4096,),
        "clip_projector2.cross_attn.proj.bias": (768,),
        "qllama.model.embed_tokens.weight": (49954, 4096),
        "qllama.model.layers.31.self_attn.o_proj.weight": (4096, 4096),
        "qllama.model.layers.31.mlp.down_proj.weight": (4096, 11008),
        "qllama.model.layers.30.cross_attn.q_proj.weight": (4096, 4096),
        "qllama.model.layers.30.cross_attn.k_proj.weight": (4096, 3200),
        "qllama.model.layers.30.cross_attn.v_proj.weight": (4096, 3200),
        "qllama.model.layers.30.cross_attn.o_proj.weight": (4096, 4096),
        "qllama.model.layers.0.cross_attn.norm1.weight": (4096,),
        "qllama.model.layers.0.cross_attn.norm2.weight": (3200,),
        "qllama.model.norm.weight": (4096,),
        "qllama.lm_head.weight": (49954, 4096),
        "query_tokens": (1, 96, 4096),
        "text_projection": (4096, 768),
        "logit_scale": (),
        "itm_head.weight": (2, 4096),
        "itm_head.bias": (2,),
    }
    assert {name: expected[name] for name in published} == published
    crossing = {name.split(".")[3] for name in expected if ".cross_attn.norm1" in name and name.startswith("qllama")}
    assert crossing == {str(layer) for layer in range(0, 32, 2)}


def test_every_parameter_of_the_model_is_filled_by_the_checkpoint():
    for config in (INTERNVL_14B_224PX, INTERNVIT_6B_224PX):
        parsed = parse_any_config(config)
        with torch.device("meta"):
            model = make_model(parsed)
        held = sum(parameter.numel() for parameter in model.parameters())
        dropped = sum(math.prod(s) for n, s in expected_tensors(config).items() if n.endswith("cross_attn.k_bias"))
        assert held + dropped == parameters(config)


def test_a_model_tuned_at_another_size_stores_the_positions_of_that_size():
    tuned = INTERNVL_14B_224PX | {"force_image_size": 364}
    assert expected_tensors(tuned)["vision_model.embeddings.position_embedding"] == (1, 677, 3200)
    assert parse_any_config(tuned).vision.image_size == 364
    assert parse_any_config(INTERNVL_14B_224PX).vision.image_size == 224


def test_a_vision_encoder_on_its_own_has_no_prefix():
    assert parameters(INTERNVIT_6B_224PX) == 5_902_793_600
    assert parameters(INTERNVIT_300M) == 304_012_288
    assert "encoder.layers.47.ls2" in expected_tensors(INTERNVIT_6B_224PX)


def test_defaults_are_those_of_the_official_configuration():
    bare = {key: INTERNVL_14B_224PX[key] for key in ("model_type", "vision_config", "qllama_config")}
    assert parse_any_config(bare) == parse_any_config(INTERNVL_14B_224PX)


# --- files ---


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_checkpoint_in_shards_is_loaded_tensor_by_tensor(tmp_path, suffix):
    config = contrastive_config()
    weights = random_weights(config)
    old = {"vision_model.embeddings.position_ids": torch.arange(37)[None]}
    old |= {"qllama.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    write_checkpoint(tmp_path, config, weights | old, shards=3, suffix=suffix)
    model = load(tmp_path)
    assert isinstance(model, ContrastiveModel)
    own = dict(model.named_parameters())
    assert torch.equal(own["logit_scale"], weights["logit_scale"])
    assert torch.equal(own["text_projection"], weights["text_projection"])
    assert torch.equal(own["clip_projector2.v"], weights["clip_projector2.cross_attn.v.weight"])
    assert torch.equal(own["clip_projector.q.bias"], weights["clip_projector.cross_attn.q_bias"])
    layer = "qllama.model.layers.2"
    k, v = (weights[f"{layer}.cross_attn.{part}_proj.weight"] for part in "kv")
    assert torch.equal(own["qllama.layers.2.cross_attn.kv.weight"], torch.cat((k, v)))
    qkv = torch.cat([weights[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(own["qllama.layers.2.attention.qkv.weight"], qkv)


def test_a_vision_encoder_is_loaded_from_its_own_repository(tmp_path):
    config = {"model_type": "intern_vit_6b", **chat_config(vision=TINY_300M)["vision_config"]}
    weights = random_weights(config)
    write_checkpoint(tmp_path, config, weights)
    model = load(tmp_path)
    assert isinstance(model, VisionTower)
    for name, parameter in model.vision_model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("query_tokens"), "1 tensors missing: query_tokens"),
        (lambda w: w.pop("clip_projector.cross_attn.k_bias"), "missing: clip_projector.cross_attn.k_bias"),
        (lambda w: w.update(extra=torch.ones(1)), "1 tensors unexpected: extra"),
        (lambda w: w.update(logit_scale=torch.ones(1)), r"logit_scale has shape \(1,\), the config says \(\)"),
        (
            lambda w: w.update({"qllama.model.layers.1.cross_attn.norm1.weight": torch.ones(64)}),
            "unexpected: qllama.model.layers.1.cross_attn.norm1.weight",
        ),
    ],
)
def test_a_tensor_too_few_or_too_many_is_named(tmp_path, change, message):
    config = contrastive_config()
    weights = random_weights(config)
    change(weights)
    write_checkpoint(tmp_path, config, weights)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


# --- configurations that are refused ---


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("qllama_config",), None, "qllama_config: expected an object"),
        (("qllama_config", "hidden_size"), ..., "qllama_config: `hidden_size` is missing"),
        (("qllama_config", "hidden_act"), "gelu", "qllama_config: `hidden_act` is 'gelu'"),
        (("qllama_config", "num_attention_heads"), 30, "4096 is not a multiple of num_attention_heads 30"),
        (("qllama_config", "num_key_value_heads"), 8, "qllama_config: grouped queries are not supported"),
        (("qllama_config", "head_dim"), 64, "32 heads of head_dim 64 do not make hidden_size 4096"),
        (("qllama_config", "tie_word_embeddings"), True, "tied embeddings"),
        (("qllama_config", "rope_scaling"), {"type": "linear", "factor": 2.0}, "rope_scaling are not supported"),
        (("qllama_config", "max_position_embeddings"), 96, "num_query_token 96 leaves no room in the 96 positions"),
        (("attn_pool_num_heads",), 15, "vision_config: hidden_size 3200 is not a multiple of attn_pool_num_heads 15"),
        (("num_query_token",), 0, "`num_query_token` must be positive"),
        (("clip_embed_dim",), "768", "`clip_embed_dim` must be int"),
        (("force_image_size",), -1, "`force_image_size` must be positive"),
        (("use_qllama_lora",), 16, "`use_qllama_lora` is 16; merge the LoRA weights first"),
        (("use_backbone_lora",), 8, "`use_backbone_lora` is 8"),
        (("vision_config",), ..., "vision_config: expected an object"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_named(path, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_any_config(changed(path, value))


def test_a_contrastive_model_is_no_chat_model_and_the_reverse(tmp_path):
    from vitrail.runtime.config import InternVLConfig, load_config

    with pytest.raises(ConfigError, match=r"this is a contrastive model \(InternVL-C/G\), not a chat model"):
        load_config(INTERNVL_14B_224PX)
    with pytest.raises(ConfigError, match="qllama_config: expected an object"):
        parse_contrastive_config(INTERNVL_CHAT_V1_5)
    assert isinstance(parse_any_config(INTERNVL_CHAT_V1_5), InternVLConfig)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match=r"config\.json: expected an object"):
        load_any_config(tmp_path)
