import json
from copy import deepcopy
from dataclasses import FrozenInstanceError, asdict
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.runtime.config import InternVLConfig, RopeScaling, load_config, parse_config
from vitrail.runtime.errors import CheckpointError, ConfigError

from ..official_configs import (
    INTERNVIT_6B,
    INTERNVIT_300M,
    INTERNVL2_1B,
    INTERNVL_CHAT_V1_5,
    PHI3_MINI_128K,
    QWEN3_8B,
    YI_34B,
    chat,
)
from ..random_checkpoints import ARCHITECTURES, chat_config

Path_ = tuple[str, ...]


def changed(base: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """A copy in which one entry, possibly of a sub-config, has another value; `...` removes it."""
    config = deepcopy(base)
    section = config
    for key in path[:-1]:
        section = section[key]
    if value is ...:
        section.pop(path[-1], None)
    else:
        section[path[-1]] = value
    return config


def with_vision(**changes: Any) -> dict[str, Any]:
    return chat(INTERNVIT_6B | changes, INTERNVL_CHAT_V1_5["llm_config"])


def with_llm(base: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return chat(INTERNVIT_6B, (INTERNVL_CHAT_V1_5["llm_config"] if base is None else base) | changes)


def test_the_config_of_v1_5_is_read_entry_by_entry() -> None:
    config = parse_config(INTERNVL_CHAT_V1_5)
    assert asdict(config) == {
        "vision": {
            "hidden_size": 3200,
            "num_attention_heads": 25,
            "intermediate_size": 12800,
            "num_hidden_layers": 45,
            "image_size": 448,
            "patch_size": 14,
            "qkv_bias": False,
            "qk_normalization": True,
            "norm_type": "rms_norm",
            "layer_norm_eps": 1e-6,
        },
        "llm": {
            "architecture": "InternLM2ForCausalLM",
            "vocab_size": 92553,
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 48,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "rope_scaling": asdict(RopeScaling("dynamic", factor=2.0)),
            "max_position_embeddings": 32768,
            "qkv_bias": False,
            "output_bias": False,
            "qk_norm": False,
            "tie_word_embeddings": False,
        },
        "template": "internlm2-chat",
        "system_message": None,
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "tile_size": 448,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "pad2square": False,
        "layout": "official",
    }
    assert (config.tokens_per_tile, config.shuffle_factor, config.vision_depth) == (256, 2, 45)
    assert (config.vision.head_dim, config.vision.grid_size) == (128, 32)
    assert (config.llm.queries_per_kv_head, config.llm.kv_bytes_per_token) == (6, 196_608)


def test_every_entry_reaches_its_field() -> None:
    config = parse_config(
        chat(
            INTERNVIT_300M | {"layer_norm_eps": 1e-5, "image_size": 224},
            YI_34B | {"attention_bias": True, "head_dim": 64, "tie_word_embeddings": True},
            template="Hermes-2",
            system_message="Answer briefly.",
            select_layer=-4,
            ps_version="v1",
            force_image_size=336,
            dynamic_image_size=False,
            use_thumbnail=False,
            min_dynamic_patch=2,
            max_dynamic_patch=24,
            pad2square=True,
        )
    )
    vision, llm = config.vision, config.llm
    assert (vision.qkv_bias, vision.qk_normalization, vision.norm_type) == (True, False, "layer_norm")
    assert (vision.layer_norm_eps, vision.image_size, vision.grid_size) == (1e-5, 224, 16)
    assert (llm.qkv_bias, llm.output_bias, llm.head_dim, llm.tie_word_embeddings) == (True, True, 64, True)
    assert (llm.rope_theta, llm.rope_scaling) == (5e6, None)
    assert (config.template, config.system_message) == ("Hermes-2", "Answer briefly.")
    assert (config.select_layer, config.vision_depth, config.ps_version) == (-4, 21, "v1")
    assert (config.tile_size, config.tokens_per_tile) == (336, 144)
    assert (config.dynamic_image_size, config.use_thumbnail, config.pad2square) == (False, False, True)
    assert (config.min_dynamic_patch, config.max_dynamic_patch) == (2, 24)


@pytest.mark.parametrize(
    ("path", "field", "default"),
    [
        (("select_layer",), "select_layer", -1),
        (("downsample_ratio",), "downsample_ratio", 0.5),
        (("ps_version",), "ps_version", "v1"),
        (("force_image_size",), "tile_size", 224),
        (("dynamic_image_size",), "dynamic_image_size", False),
        (("use_thumbnail",), "use_thumbnail", False),
        (("min_dynamic_patch",), "min_dynamic_patch", 1),
        (("max_dynamic_patch",), "max_dynamic_patch", 6),
        (("pad2square",), "pad2square", False),
        (("system_message",), "system_message", None),
        (("vision_config", "norm_type"), "vision.norm_type", "rms_norm"),
        (("vision_config", "qkv_bias"), "vision.qkv_bias", False),
        (("vision_config", "qk_normalization"), "vision.qk_normalization", True),
        (("vision_config", "layer_norm_eps"), "vision.layer_norm_eps", 1e-6),
        (("vision_config", "hidden_act"), "vision.hidden_size", 1024),
        (("llm_config", "num_key_value_heads"), "llm.num_key_value_heads", 56),
        (("llm_config", "head_dim"), "llm.head_dim", 128),
        (("llm_config", "rope_theta"), "llm.rope_theta", 1e4),
        (("llm_config", "rope_scaling"), "llm.rope_scaling", None),
        (("llm_config", "attention_bias"), "llm.qkv_bias", False),
        (("llm_config", "tie_word_embeddings"), "llm.tie_word_embeddings", False),
    ],
)
@pytest.mark.parametrize("absent", [..., None], ids=["absent", "null"])
def test_an_absent_or_null_entry_takes_the_official_default(path: Path_, field: str, default: Any, absent: Any) -> None:
    base = chat(
        INTERNVIT_300M | {"image_size": 224},
        YI_34B | {"head_dim": 64, "attention_bias": True, "tie_word_embeddings": True},
        system_message="Answer briefly.",
        select_layer=-2,
        min_dynamic_patch=2,
        pad2square=True,
    )
    value: Any = parse_config(changed(base, path, absent))
    for name in field.split("."):
        value = getattr(value, name)
    assert value == default


REQUIRED = [
    ("template",),
    ("vision_config",),
    ("llm_config",),
    *(("vision_config", key) for key in ("hidden_size", "num_attention_heads", "intermediate_size")),
    *(("vision_config", key) for key in ("num_hidden_layers", "image_size", "patch_size")),
    *(("llm_config", key) for key in ("architectures", "vocab_size", "hidden_size", "intermediate_size")),
    *(("llm_config", key) for key in ("num_hidden_layers", "num_attention_heads", "rms_norm_eps")),
    ("llm_config", "max_position_embeddings"),
]


@pytest.mark.parametrize("path", REQUIRED, ids=".".join)
@pytest.mark.parametrize("absent", [..., None], ids=["absent", "null"])
def test_a_missing_required_entry_is_named(path: Path_, absent: Any) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(changed(INTERNVL_CHAT_V1_5, path, absent))
    assert all(key in str(error.value) for key in path[-2:])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("template",), 7),
        (("system_message",), ["Answer briefly."]),
        (("select_layer",), "last"),
        (("downsample_ratio",), "0.5"),
        (("ps_version",), 2),
        (("force_image_size",), 448.0),
        (("force_image_size",), [448, 448]),
        (("dynamic_image_size",), "true"),
        (("use_thumbnail",), 1),
        (("max_dynamic_patch",), True),
        (("vision_config", "hidden_size"), "3200"),
        (("vision_config", "hidden_size"), -3200),
        (("vision_config", "num_hidden_layers"), 0),
        (("vision_config", "qkv_bias"), 0),
        (("vision_config", "layer_norm_eps"), "1e-6"),
        (("vision_config", "layer_norm_eps"), 0),
        (("llm_config", "vocab_size"), 92553.0),
        (("llm_config", "num_attention_heads"), 0),
        (("llm_config", "rms_norm_eps"), nan),
        (("llm_config", "rope_theta"), -1e6),
        (("llm_config", "rope_theta"), inf),
        (("llm_config", "rope_scaling", "factor"), 0),
        (("llm_config", "rope_scaling", "factor"), "2"),
        (("llm_config", "tie_word_embeddings"), "no"),
        (("llm_config", "bias"), 1),
    ],
    ids=str,
)
def test_an_entry_of_the_wrong_type_or_range_is_named_with_its_value(path: Path_, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{path[-1]}`") as error:
        parse_config(changed(INTERNVL_CHAT_V1_5, path, wrong))
    assert str(wrong) in str(error.value)


@pytest.mark.parametrize("section", ["vision_config", "llm_config"])
@pytest.mark.parametrize("wrong", [[], "6B", 7])
def test_a_section_that_is_no_object_is_named(section: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"{section}: expected an object"):
        parse_config(changed(INTERNVL_CHAT_V1_5, (section,), wrong))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "llava", "unknown model_type 'llava'; known: internvl_chat"),
        (("model_type",), "internvl", "text_config: expected an object"),
        (("model_type",), ..., "unknown model_type None"),
        (("ps_version",), "v3", "`ps_version` is 'v3'; known: v1, v2"),
        (("use_llm_lora",), 16, "`use_llm_lora` is 16; merge the LoRA weights first"),
        (("use_backbone_lora",), 8, "`use_backbone_lora` is 8"),
        (("vision_config", "norm_type"), "batch_norm", "`norm_type` is 'batch_norm'; known: rms_norm, layer_norm"),
        (("vision_config", "hidden_act"), "relu", "`hidden_act` is 'relu'; known: gelu"),
        (("llm_config", "architectures"), ["MambaForCausalLM"], "unknown architecture 'MambaForCausalLM'; known: Int"),
        (("llm_config", "architectures"), [], "`architectures` is missing"),
        (("llm_config", "hidden_act"), "gelu", "`hidden_act` is 'gelu'; known: silu"),
        (("llm_config", "mlp_bias"), True, "`mlp_bias` true is not supported"),
        (("llm_config", "partial_rotary_factor"), 0.5, "`partial_rotary_factor` other than 1"),
        (("llm_config", "rope_scaling"), {"type": "yarn", "factor": 2.0}, "unknown type 'yarn'; known: linear, dynam"),
        (("llm_config", "rope_scaling"), {"factor": 2.0}, "llm_config.rope_scaling: `type` is missing"),
        (("llm_config", "rope_scaling"), {"type": "linear"}, "llm_config.rope_scaling: `factor` is missing"),
        (("llm_config", "rope_scaling"), "dynamic", "llm_config.rope_scaling: expected an object"),
    ],
)
def test_what_vitrail_does_not_know_is_refused_by_name(path: Path_, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(changed(INTERNVL_CHAT_V1_5, path, value))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_vision(hidden_size=3201), "hidden_size 3201 is not a multiple of num_attention_heads 25"),
        (with_vision(image_size=13), "image_size 13 is below patch_size 14"),
        (with_llm(num_key_value_heads=7), "num_attention_heads 48 is not a multiple of num_key_value_heads 7"),
        (with_llm(hidden_size=6145), "hidden_size 6145 is not a multiple of num_attention_heads 48"),
        (with_llm(head_dim=127), "head_dim 127 is odd"),
        (changed(INTERNVL_CHAT_V1_5, ("force_image_size",), 450), "force_image_size 450 must be a multiple"),
        (changed(INTERNVL_CHAT_V1_5, ("force_image_size",), 434), "force_image_size 434 must be a multiple"),
        (changed(INTERNVL_CHAT_V1_5, ("downsample_ratio",), 0.3), "downsample_ratio 0.3 is not 1 over a whole number"),
        (changed(INTERNVL_CHAT_V1_5, ("downsample_ratio",), 2.0), "downsample_ratio 2.0 is not 1 over"),
        (changed(INTERNVL_CHAT_V1_5, ("select_layer",), -46), "select_layer -46 lies outside 45 blocks"),
        (changed(INTERNVL_CHAT_V1_5, ("select_layer",), 46), "select_layer 46 lies outside 45 blocks"),
        (changed(INTERNVL_CHAT_V1_5, ("min_dynamic_patch",), 13), "min_dynamic_patch 13 and max_dynamic_patch 12"),
    ],
)
def test_entries_that_contradict_each_other_are_refused_with_their_values(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(config)


@pytest.mark.parametrize(
    ("select_layer", "depth"), [(-1, 45), (-2, 44), (-45, 1), (45, 45), (1, 1)], ids=lambda value: str(value)
)
def test_select_layer_counts_the_embeddings_as_layer_0(select_layer: int, depth: int) -> None:
    assert parse_config(changed(INTERNVL_CHAT_V1_5, ("select_layer",), select_layer)).vision_depth == depth


@pytest.mark.parametrize(
    ("architecture", "entries", "biases"),
    [
        ("InternLM2ForCausalLM", {"bias": False}, (False, False)),
        ("InternLM2ForCausalLM", {"bias": True}, (True, True)),
        ("InternLM2ForCausalLM", {"bias": None}, (True, True)),  # the official class's default
        ("InternLMForCausalLM", {"bias": True}, (True, True)),
        ("LlamaForCausalLM", {}, (False, False)),
        ("LlamaForCausalLM", {"attention_bias": True}, (True, True)),
        ("Qwen2ForCausalLM", {}, (True, False)),
        ("Qwen3ForCausalLM", {}, (False, False)),
        ("Phi3ForCausalLM", {}, (False, False)),
    ],
)
def test_each_architecture_has_its_biases(architecture: str, entries: Any, biases: tuple[bool, bool]) -> None:
    llm = parse_config(chat_config(architecture, llm=entries)).llm
    assert (llm.qkv_bias, llm.output_bias) == biases


def test_only_qwen3_normalises_its_queries_and_keys() -> None:
    with_norm = [name for name in ARCHITECTURES if parse_config(chat_config(name)).llm.qk_norm]
    assert with_norm == ["Qwen3ForCausalLM"]


def test_qwen3_states_its_own_head_size() -> None:
    llm = parse_config(with_llm(QWEN3_8B, num_attention_heads=64)).llm
    assert llm.head_dim == 128


def test_a_sliding_window_caps_the_context_only_where_it_is_in_use() -> None:
    def context(base: dict[str, Any], **entries: Any) -> int:
        return parse_config(with_llm(base, **entries)).llm.max_position_embeddings

    qwen2 = INTERNVL2_1B["llm_config"]
    assert context(qwen2, sliding_window=4096, use_sliding_window=False) == 32768
    assert context(qwen2, sliding_window=4096, use_sliding_window=True) == 4096
    assert context(qwen2, sliding_window=None, use_sliding_window=True) == 32768
    assert context(PHI3_MINI_128K) == 131072
    assert context(PHI3_MINI_128K, sliding_window=2047) == 2047


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (None, None),
        ({"type": "default"}, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 4}, RopeScaling("linear", factor=4.0)),
        ({"rope_type": "dynamic", "factor": 6.0}, RopeScaling("dynamic", factor=6.0)),
        ({"rope_type": "dynamic", "type": "linear", "factor": 6.0}, RopeScaling("dynamic", factor=6.0)),
    ],
)
def test_rope_scaling_is_read_under_both_of_its_names(entry: Any, expected: RopeScaling | None) -> None:
    assert parse_config(with_llm(rope_scaling=entry)).llm.rope_scaling == expected


@pytest.mark.parametrize("name", ["su", "longrope"])
def test_longrope_is_read_with_its_factors(name: str) -> None:
    entries = PHI3_MINI_128K["rope_scaling"] | {"type": name}
    scaling = parse_config(with_llm(PHI3_MINI_128K, rope_scaling=entries)).llm.rope_scaling
    assert scaling is not None
    assert (scaling.rope_type, scaling.factor, scaling.original_max_position_embeddings) == ("longrope", 32.0, 4096)
    assert scaling.short_factor == tuple(entries["short_factor"])
    assert scaling.long_factor == tuple(entries["long_factor"])
    assert scaling.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)


def test_longrope_that_stretches_nothing_keeps_the_amplitude() -> None:
    scaling = parse_config(with_llm(PHI3_MINI_128K, max_position_embeddings=4096)).llm.rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == 1.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"short_factor": [1.0] * 47}, "`short_factor` must list 48 numbers"),
        ({"long_factor": None}, "`long_factor` must list 48 numbers"),
        ({"long_factor": [1.0] * 47 + ["x"]}, r"`long_factor\[47\]` must be float, found 'x'"),
        ({"short_factor": [1.0, None] * 24}, r"`short_factor\[1\]` is missing"),
        ({"short_factor": [0.0] * 48}, r"`short_factor\[0\]` must be positive"),
    ],
)
def test_longrope_factors_must_be_one_positive_number_per_frequency(entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(with_llm(PHI3_MINI_128K, rope_scaling=PHI3_MINI_128K["rope_scaling"] | entries))


@pytest.mark.parametrize("original", [..., 1])
def test_longrope_needs_the_length_it_was_first_trained_to(original: Any) -> None:
    path = ("llm_config", "original_max_position_embeddings")
    with pytest.raises(ConfigError, match="`original_max_position_embeddings`"):
        parse_config(changed(chat(INTERNVIT_6B, PHI3_MINI_128K), path, original))


def test_configs_are_frozen_and_compare_by_value() -> None:
    config = parse_config(INTERNVL_CHAT_V1_5)
    assert config == parse_config(deepcopy(INTERNVL_CHAT_V1_5))
    assert hash(config) == hash(parse_config(INTERNVL_CHAT_V1_5))
    with pytest.raises(FrozenInstanceError):
        config.template = "other"  # type: ignore[misc]


def test_a_folder_and_a_decoded_config_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(INTERNVL2_1B), encoding="utf-8")
    expected = parse_config(INTERNVL2_1B)
    assert load_config(tmp_path) == load_config(str(tmp_path)) == load_config(INTERNVL2_1B) == expected


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=f"{folder}/config.json: No such file"):
            load_config(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{'model_type': 'internvl_chat'}", b"\x80\x81", b"\xff\xfe{\x00}\x00", b"[" * 100_000],
    ids=["empty", "cut-off", "python", "not-utf8", "utf16", "nested"],
)
def test_a_config_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: not valid JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", ["[]", "7", '"internvl_chat"', "null"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json: expected an object"):
        load_config(tmp_path)


def entries_of(config: dict[str, Any], above: Path_ = ()) -> list[Path_]:
    paths: list[Path_] = []
    for key, value in config.items():
        paths.append((*above, key))
        if isinstance(value, dict):
            paths += entries_of(value, (*above, key))
    return paths


BASES = [INTERNVL_CHAT_V1_5, INTERNVL2_1B, chat(INTERNVIT_300M, PHI3_MINI_128K), chat(INTERNVIT_6B, QWEN3_8B)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**9) | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
def test_any_json_in_any_place_gives_a_usable_config_or_a_config_error(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from(BASES))
    path = data.draw(st.sampled_from(entries_of(base)))
    value = data.draw(JSON | st.integers(-3, 3) | st.sampled_from(["linear", "v1", [1.0] * 48, {"type": "linear"}]))
    try:
        config = parse_config(changed(base, path, value))
    except ConfigError as error:
        assert str(error)
        assert "\n" not in str(error)
    else:
        assert_usable(config)


def assert_usable(config: InternVLConfig) -> None:
    assert config.tokens_per_tile >= 1
    assert 1 <= config.vision_depth <= config.vision.num_hidden_layers
    assert config.vision.grid_size >= 1
    assert config.vision.head_dim >= 1
    assert config.llm.head_dim % 2 == 0
    assert config.llm.queries_per_kv_head * config.llm.num_key_value_heads == config.llm.num_attention_heads
    for number in (config.llm.rope_theta, config.llm.rms_norm_eps, config.vision.layer_norm_eps):
        assert 0 < number < inf
