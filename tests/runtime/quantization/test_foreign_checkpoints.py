"""Checkpoints that other tools quantised, packed here by their formats' definitions, against their meant values."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.runtime.config import load_config, parse_config
from vitrail.runtime.errors import CheckpointError, ConfigError, UnsupportedError
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.quantization.formats.detect import stored_format
from vitrail.runtime.quantization.model import linear_layers
from vitrail.runtime.quantization.weight import QuantizedWeight
from vitrail.runtime.weights import build_model, expected_tensors, load_model

from ...random_checkpoints import build, chat_config, random_weights, write_checkpoint
from ..command_line import vitrail
from . import packing

CPU = torch.device("cpu")
GROUP = 16
Pack = Callable[[str, Tensor], tuple[packing.Tensors, Tensor]]


def act_order(name: str, columns: int, size: int = GROUP) -> Tensor:
    """The group of each input; the same for projections that share their input, as GPTQ finds it from that."""
    generator = torch.Generator().manual_seed(columns + ("o_proj" in name))
    order = torch.randperm(columns, generator=generator)
    groups = torch.empty(columns, dtype=torch.int64)
    groups[order] = torch.arange(columns) // size
    return groups


def generator_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
A8 = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

FORMATS: dict[str, tuple[dict[str, Any], Pack, str]] = {
    "awq": (AWQ, lambda name, w: packing.awq(w, GROUP, generator_of(name)), "int4"),
    "gptq": (GPTQ, lambda name, w: packing.gptq(w, GROUP, generator_of(name)), "int4"),
    "gptq v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        lambda name, w: packing.gptq(w, GROUP, generator_of(name), version=2),
        "int4",
    ),
    "gptq act-order": (
        GPTQ | {"desc_act": True},
        lambda name, w: packing.gptq(w, GROUP, generator_of(name), groups=act_order(name, w.shape[1])),
        "int4",
    ),
    "bitsandbytes int8": (INT8, lambda name, w: packing.bnb_int8(w), "int8-weight"),
    "bitsandbytes nf4": (NF4, lambda name, w: packing.bnb_nf4(w), "nf4"),
    "w8a8": (packing.scheme(W8, A8, "int-quantized"), lambda name, w: packing.w8(w), "int8"),
    "w8a16": (packing.scheme(W8, None, "pack-quantized"), lambda name, w: packing.w8_packed(w), "int8-weight"),
    "w4a16": (
        packing.scheme(W4 | {"symmetric": True}, None, "pack-quantized"),
        lambda name, w: packing.w4(w, GROUP, generator_of(name), symmetric=True),
        "int4",
    ),
    "w4a16 asymmetric": (
        packing.scheme(W4 | {"symmetric": False}, None, "pack-quantized"),
        lambda name, w: packing.w4(w, GROUP, generator_of(name), symmetric=False),
        "int4",
    ),
    "w4a16 act-order": (
        packing.scheme(W4 | {"symmetric": True, "actorder": "group"}, None, "pack-quantized"),
        lambda name, w: packing.w4(w, GROUP, generator_of(name), symmetric=True, groups=act_order(name, w.shape[1])),
        "int4",
    ),
    "fp8": (
        packing.scheme(W8 | {"type": "float"}, A8 | {"type": "float"}, "float-quantized"),
        lambda name, w: packing.fp8(w),
        "fp8",
    ),
}


def is_projection(name: str) -> bool:
    return ".layers." in name and name.startswith("language_model.") and name.endswith(".weight") and "norm" not in name


def quantised(
    config: dict[str, Any], section: dict[str, Any], pack: Pack, which: Callable[[str], bool] = is_projection
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The config, tensors and meant plain tensors of a checkpoint whose layers `which` are packed."""
    tensors: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in random_weights(config).items():
        if which(name):
            packed, meant[name] = pack(name, weight)
            layer = name.removesuffix(".weight")
            tensors |= {layer + suffix: tensor for suffix, tensor in packed.items()}
        else:
            tensors[name] = meant[name] = weight
    return config | {"quantization_config": section}, tensors, meant


def load(config: dict[str, Any], tensors: dict[str, Tensor], *, pack: bool = False, **keywords: Any) -> InternVLModel:
    return build_model(
        parse_config(config),
        tensors.items(),
        dtype=torch.float32,
        device=CPU,
        stored=stored_format(config),
        pack=pack,
        **keywords,
    )


def weights_of(model: InternVLModel) -> dict[str, Tensor]:
    layers = linear_layers(model).items()
    return {name: w.dequantize() if isinstance(w := layer.weight, QuantizedWeight) else w for name, layer in layers}


def hidden(model: InternVLModel) -> Tensor:
    decoder = model.language_model
    ids = torch.arange(24) * 7 % 500
    inv_freq = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    with torch.inference_mode():
        return decoder.logits(decoder(decoder.embed(ids)[None], torch.arange(24)[None], inv_freq))


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_that_the_format_means(name: str, architecture: str) -> None:
    section, pack, method = FORMATS[name]
    config, tensors, meant = quantised(chat_config(architecture), section, pack)
    model = load(config, tensors)
    reference = weights_of(build(config, meant))
    found = weights_of(model)
    assert found.keys() == reference.keys()
    for layer, weight in found.items():
        torch.testing.assert_close(weight, reference[layer], rtol=1e-5, atol=1e-6, msg=lambda m, at=layer: f"{at}: {m}")
    qkv = model.language_model.layers[1].attention.qkv.weight
    assert isinstance(qkv, QuantizedWeight)
    assert qkv.method == method


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_model_computes_what_dequantised_weights_give(name: str) -> None:
    section, pack, method = FORMATS[name]
    config, tensors, meant = quantised(chat_config("Qwen2ForCausalLM"), section, pack)
    expected = hidden(build(config, meant))
    found = hidden(load(config, tensors, pack=True))
    error = (found - expected).norm() / expected.norm()
    # What rounding activations costs: nothing for nf4, 8 bits of a token or group, or e4m3's 4 bits.
    assert error < {"nf4": 1e-5, "fp8": 0.15}.get(method, 0.03), error


def test_the_layout_of_internvl2_awq_loads_from_shards(tmp_path: Path) -> None:
    # LMDeploy leaves the vision half as it is without saying so, and writes the section to both places.
    section, pack, _ = FORMATS["awq"]
    config, tensors, meant = quantised(chat_config(), section | {"modules_to_not_convert": None}, pack)
    config["llm_config"] = config["llm_config"] | {"quantization_config": section}
    write_checkpoint(tmp_path, config, tensors, shards=5)
    model = load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=CPU, progress=False)
    expected = hidden(build(config, meant))
    assert (hidden(model) - expected).norm() / expected.norm() < 0.03
    assert not any(isinstance(layer.weight, QuantizedWeight) for layer in linear_layers(model.vision_model).values())
    assert expected_tensors(tmp_path) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_a_section_in_llm_config_alone_is_seen() -> None:
    config = chat_config(llm={"quantization_config": AWQ})
    assert "language_model.model.layers.0.attention.wqkv.qweight" in expected_tensors(config)


def test_pickled_shards_load_as_well(tmp_path: Path) -> None:
    config, tensors, meant = quantised(chat_config(), *FORMATS["gptq"][:2])
    write_checkpoint(tmp_path, config, tensors, shards=3, suffix=".bin")
    model = load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=CPU, progress=False)
    expected = hidden(build(config, meant))
    assert (hidden(model) - expected).norm() / expected.norm() < 0.03


def test_projections_of_different_act_orders_are_dequantised() -> None:
    def pack(name: str, weight: Tensor) -> tuple[packing.Tensors, Tensor]:
        groups = act_order(name, weight.shape[1])
        groups = groups.flip(0) if "k_proj" in name else groups
        return packing.gptq(weight, GROUP, generator_of(name), groups=groups)

    config, tensors, meant = quantised(chat_config("Qwen2ForCausalLM"), GPTQ | {"desc_act": True}, pack)
    model = load(config, tensors)
    layer = model.language_model.layers[0]
    torch.testing.assert_close(
        layer.attention.qkv.weight, weights_of(build(config, meant))["language_model.layers.0.attention.qkv"]
    )
    assert isinstance(layer.attention.qkv.weight, torch.nn.Parameter)
    assert isinstance(layer.attention.o.weight, QuantizedWeight)


def test_groups_of_unequal_sizes_are_dequantised() -> None:
    def pack(name: str, weight: Tensor) -> tuple[packing.Tensors, Tensor]:
        groups = act_order(name, weight.shape[1])
        groups[groups == 1] = 0
        groups[0] = int(groups.max())
        return packing.gptq(weight, GROUP, generator_of(name), groups=groups)

    config, tensors, meant = quantised(chat_config("Qwen2ForCausalLM"), GPTQ | {"desc_act": True}, pack)
    found, reference = weights_of(load(config, tensors)), weights_of(build(config, meant))
    for layer, weight in found.items():
        torch.testing.assert_close(weight, reference[layer], rtol=1e-5, atol=1e-6)


def test_a_bitsandbytes_checkpoint_of_both_halves_loads() -> None:
    # InternVL-Chat-V1-5-Int8: the vision half as well, the head listed as left out.
    def which(name: str) -> bool:
        return is_projection(name) or (
            ".encoder.layers." in name and name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
        )

    section = INT8 | {"llm_int8_skip_modules": ["output", "mlp1"]}
    config, tensors, meant = quantised(chat_config(), section, lambda name, w: packing.bnb_int8(w), which)
    del section["quant_method"]  # older transformers did not write it
    model = load(config, tensors)
    found, reference = weights_of(model), weights_of(build(config, meant))
    for layer, weight in found.items():
        torch.testing.assert_close(weight, reference[layer], rtol=1e-5, atol=1e-6)
    fc1 = model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert isinstance(fc1, QuantizedWeight) and fc1.method == "int8-weight"


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_tensors_that_the_library_wrote_load(nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def pack(name: str, weight: Tensor) -> tuple[packing.Tensors, Tensor]:
        codes, state = bnb.functional.quantize_4bit(
            weight.half(), quant_type="nf4", blocksize=64, compress_statistics=nested
        )
        tensors = {f".weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        return {".weight": codes, **tensors}, bnb.functional.dequantize_4bit(codes, state).float()

    # Where a block of 64 reaches from one row into the next, the library's own CPU kernel reads other scales.
    config = chat_config(llm={"intermediate_size": 128})
    config, tensors, meant = quantised(config, NF4 | {"bnb_4bit_use_double_quant": nested}, pack)
    found, reference = weights_of(load(config, tensors)), weights_of(build(config, meant))
    for layer, weight in found.items():
        torch.testing.assert_close(weight, reference[layer], rtol=1e-3, atol=1e-4)  # theirs is rounded to fp16


def test_int8_tensors_that_the_library_wrote_load() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def pack(name: str, weight: Tensor) -> tuple[packing.Tensors, Tensor]:
        codes, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        meant = bnb.functional.int8_vectorwise_dequant(codes, largest)
        return {".weight": codes, ".SCB": largest}, meant

    config, tensors, meant = quantised(chat_config(), INT8, pack)
    found, reference = weights_of(load(config, tensors)), weights_of(build(config, meant))
    for layer, weight in found.items():
        torch.testing.assert_close(weight, reference[layer], rtol=1e-5, atol=1e-6)


def test_an_int8_checkpoint_runs_by_the_library_when_asked_to() -> None:
    config, tensors, meant = quantised(chat_config(), *FORMATS["bitsandbytes int8"][:2])
    model = load(config, tensors, pack=True, quantization=QuantizationConfig(llm="bnb-int8"))
    weight = model.language_model.layers[0].mlp.down.weight
    assert isinstance(weight, QuantizedWeight) and weight.method == "bnb-int8"
    expected = hidden(build(config, meant))
    assert (hidden(model) - expected).norm() / expected.norm() < 0.03


def test_the_other_half_of_a_quantised_checkpoint_can_be_rounded() -> None:
    config, tensors, _ = quantised(chat_config(), *FORMATS["awq"][:2])
    with pytest.warns(UserWarning, match=r"12 linear layers are rounded to nearest \(int8\)"):
        model = load(config, tensors, quantization=QuantizationConfig(llm="int4", vision="int8", group_size=GROUP))
    fc1 = model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert isinstance(fc1, QuantizedWeight) and fc1.method == "int8"


def test_a_stored_method_is_not_exchanged_for_another() -> None:
    config, tensors, _ = quantised(chat_config(), *FORMATS["awq"][:2])
    with pytest.raises(ConfigError, match=r"quantization='int8'.*wqkv is stored quantised by awq, as int4"):
        load(config, tensors, quantization=QuantizationConfig(llm="int8"))


def test_a_vision_half_stored_with_four_bits_warns() -> None:
    config, tensors, _ = quantised(
        chat_config(vision={"hidden_size": 192}),
        NF4,
        lambda name, w: packing.bnb_nf4(w),
        lambda name: is_projection(name) or name.endswith("attn.proj.weight"),
    )
    with pytest.warns(UserWarning, match="vision half is stored with four bits"):
        load(config, tensors)


def test_inspect_names_the_format(tmp_path: Path) -> None:
    config, tensors, _ = quantised(chat_config(), *FORMATS["gptq"][:2])
    write_checkpoint(tmp_path, config, tensors)
    ran = vitrail("inspect", tmp_path)
    assert ran.status == 0 and re.search(r"quantised +gptq int4", ran.out), ran
    facts = json.loads(vitrail("inspect", tmp_path, "--json").out)
    # g_idx may be there or not, so that it is not counted among those that must be.
    required = [name for name in tensors if not name.endswith("g_idx")]
    assert (facts["quantization"], facts["tensors"]) == ("gptq int4", len(required))
    assert facts["parameters"]["total"] == sum(tensor.numel() for tensor in random_weights(chat_config()).values())


# What is wrong with a checkpoint


def change(tensors: dict[str, Tensor], suffix: str, by: Callable[[Tensor], Tensor]) -> str:
    name = next(name for name in tensors if name.endswith(suffix))
    tensors[name] = by(tensors[name])
    return name


def as_nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


@pytest.mark.parametrize(
    ("name", "suffix", "by", "message"),
    [
        ("awq", ".qweight", lambda t: t[:-1], "wqkv.qweight has shape"),
        ("awq", ".scales", as_nan, "scales: holds scales that are not finite"),
        ("awq", ".qzeros", lambda t: t.float(), "qzeros is torch.float32"),
        ("gptq", ".g_idx", lambda t: t + 1, "groups of its inputs lie outside"),
        ("bitsandbytes int8", ".SCB", as_nan, "SCB: holds scales that are not finite"),
        ("bitsandbytes int8", ".weight_format", lambda t: t + 1, "weight_format: only rows"),
        ("bitsandbytes nf4", ".quant_map", lambda t: t.flip(0), "quant_map: does not hold the levels of nf4"),
        ("bitsandbytes nf4", "bitsandbytes__nf4", lambda t: t[:-4], "not the description of a quantised tensor"),
        ("w4a16", ".weight_shape", lambda t: t.flip(0), "weight_shape: says"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, suffix: str, by: Callable[[Tensor], Tensor], message: str) -> None:
    config, tensors, _ = quantised(chat_config(), *FORMATS[name][:2])
    change(tensors, suffix, by)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        load(config, tensors)


def test_a_nonzero_bias_that_the_model_lacks_is_refused() -> None:
    config, tensors, _ = quantised(chat_config(), *FORMATS["gptq"][:2])
    name = "language_model.model.layers.1.attention.wo.bias"
    load(config, tensors | {name: torch.zeros(64)})
    with pytest.raises(CheckpointError, match=f"{name}: is not zero"):
        load(config, tensors | {name: torch.ones(64)})


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_is_needed_and_none_is_ignored(name: str) -> None:
    config, tensors, _ = quantised(chat_config(), *FORMATS[name][:2])
    layer = "language_model.model.layers.2.feed_forward.w1"
    missing = {".qzeros", ".scales", ".SCB", ".weight.absmax", ".weight_scale"}
    for part in [key for key in tensors if key.startswith(layer) and key.removeprefix(layer) in missing]:
        with pytest.raises(CheckpointError, match=layer):
            load(config, {key: tensor for key, tensor in tensors.items() if key != part})
    with pytest.raises(CheckpointError, match=r"1 tensors unexpected: language_model\.surplus"):
        load(config, tensors | {"language_model.surplus": torch.zeros(1)})


def test_quantised_tensors_without_a_section_say_so() -> None:
    config, tensors, _ = quantised(chat_config(), *FORMATS["awq"][:2])
    del config["quantization_config"]
    with pytest.raises(CheckpointError, match="it has no quantization_config"):
        load(config, tensors)


def test_a_section_that_contradicts_the_tensors_is_refused() -> None:
    plain = chat_config()
    with pytest.raises(CheckpointError, match=r"wqkv has no qweight, but quantization_config \(awq\) says"):
        load(plain | {"quantization_config": AWQ}, random_weights(plain))
    config, tensors, _ = quantised(plain, AWQ | {"modules_to_not_convert": ["w1"]}, FORMATS["awq"][1])
    with pytest.raises(
        CheckpointError, match=r"w1 is quantised \(qweight\), but quantization_config \(awq\) says that it is not"
    ):
        load(config, tensors)
    config, tensors, _ = quantised(plain, AWQ | {"group_size": 8}, FORMATS["awq"][1])
    with pytest.raises(CheckpointError, match=r"qzeros has shape \(4, 16\), the config says \(8, 16\)"):
        load(config, tensors)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"quant_method": "hqq"}, ConfigError, "quant_method 'hqq' is not known"),
        ("awq", ConfigError, "quantization_config must be an object"),
        (AWQ | {"bits": 3}, UnsupportedError, "weights of 3 bits"),
        (AWQ | {"version": "gemv"}, UnsupportedError, "version 'gemv'"),
        (AWQ | {"zero_point": False}, UnsupportedError, "without zero points"),
        (AWQ | {"modules_to_not_convert": "vision_model"}, ConfigError, "must be a list of strings"),
        (GPTQ | {"bits": 8}, UnsupportedError, "weights of 8 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, UnsupportedError, "'marlin'"),
        (GPTQ | {"dynamic": {"layers.0": {"bits": 8}}}, UnsupportedError, "`dynamic` settings"),
        (INT8 | {"load_in_8bit": False}, ConfigError, "one of `load_in_4bit` and `load_in_8bit`"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, UnsupportedError, "'fp4'"),
        (packing.scheme(W8 | {"num_bits": 2}, None, "pack-quantized"), UnsupportedError, "weights int 2"),
        (packing.scheme(W8, A8 | {"num_bits": 4}, "int-quantized"), UnsupportedError, "activations int 4"),
        (packing.scheme(W8, A8, "int-quantized") | {"kv_cache_scheme": {"num_bits": 8}}, UnsupportedError, "kv_cache"),
        ({"quant_method": "vitrail", "version": 2}, ConfigError, "version 2"),
    ],
)
def test_a_section_that_cannot_be_followed_is_refused(section: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        expected_tensors(chat_config() | {"quantization_config": section})


def test_two_sections_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="name different methods"):
        stored_format(chat_config(llm={"quantization_config": AWQ}) | {"quantization_config": GPTQ})


def test_a_group_size_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"`group_size` 48 does not divide the 64 inputs of .*wqkv"):
        expected_tensors(chat_config() | {"quantization_config": AWQ | {"group_size": 48}})


def test_loading_a_quantised_checkpoint_warns_of_nothing() -> None:
    config, tensors, _ = quantised(chat_config(), *FORMATS["w8a8"][:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(config, tensors, pack=True)
