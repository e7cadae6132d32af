"""Models with quantised weights: rounded in place or while they load, written in our layout and read again."""

import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.kernels.quantize import QuantizedRows
from vitrail.runtime.api import Runtime
from vitrail.runtime.config import load_config, parse_config
from vitrail.runtime.errors import CheckpointError, ConfigError, UnsupportedError
from vitrail.runtime.layers.linear import LinearGelu
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.quantization.config import METHODS, QuantizationConfig
from vitrail.runtime.quantization.formats.detect import stored_format
from vitrail.runtime.quantization.int8 import Int8Weight
from vitrail.runtime.quantization.methods import quantize_weight
from vitrail.runtime.quantization.model import capturable, connect, linear_layers, quantize_model
from vitrail.runtime.quantization.weight import QuantizedWeight
from vitrail.runtime.weights import build_model, checkpoint_tensors, expected_tensors, load_model

from ...random_checkpoints import (
    INTERNVIT_300M,
    build,
    build_contrastive,
    chat_config,
    contrastive_config,
    random_tiles,
    random_weights,
    write_checkpoint,
)

CPU = torch.device("cpu")
RECEIPT = Path(__file__).resolve().parents[3] / "examples" / "receipt.png"
SMALL: dict[str, Any] = {"llm": {"intermediate_size": 128}}  # nf4 takes inputs by 64
INT4 = QuantizationConfig(llm="int4", vision="int8", group_size=16)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ linear layers are rounded to nearest")
        yield


def rounded(config: dict[str, Any], quantization: QuantizationConfig, **keywords: Any) -> InternVLModel:
    return build_model(
        parse_config(config),
        random_weights(config).items(),
        dtype=torch.float32,
        device=CPU,
        quantization=quantization,
        **keywords,
    )


def methods_of(model: torch.nn.Module) -> dict[str, str]:
    layers = linear_layers(model).items()
    return {name: w.method for name, layer in layers if isinstance(w := layer.weight, QuantizedWeight)}


def weight_of(model: torch.nn.Module, name: str) -> Tensor:
    weight = linear_layers(model)[name].weight
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def logits(model: InternVLModel) -> Tensor:
    decoder = model.language_model
    ids = torch.arange(24) * 7 % 500
    inv_freq = 1 / 10000 ** (torch.arange(0, decoder.config.head_dim, 2) / decoder.config.head_dim)
    with torch.inference_mode():
        return decoder.logits(decoder(decoder.embed(ids)[None], torch.arange(24)[None], inv_freq))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())


# While a checkpoint is loaded, and in place


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"])
def test_rounding_while_loading_is_rounding_in_place(architecture: str) -> None:
    config = chat_config(architecture)
    loaded, plain = rounded(config, INT4), build(config, random_weights(config))
    expected = {name: layer.weight.clone() for name, layer in linear_layers(plain).items() if ".layers." in name}
    quantize_model(plain, "int4", "int8", group_size=16)
    assert methods_of(loaded) == methods_of(plain)
    assert methods_of(loaded).keys() == expected.keys()
    assert set(methods_of(loaded).values()) == {"int4", "int8"}
    for name, weight in expected.items():
        assert torch.equal(weight_of(loaded, name), weight_of(plain, name)), name
        assert (weight_of(loaded, name) - weight).norm() / weight.norm() < 0.1, name


@pytest.mark.parametrize("method", METHODS)
def test_a_random_model_with_every_method_is_near_the_plain_one(method: str) -> None:
    config = chat_config(**SMALL)
    vision = method if method not in ("int4", "nf4") else None
    plain = build(config, random_weights(config))
    model = rounded(config, QuantizationConfig(llm=method, vision=vision, group_size=32))
    tiles = random_tiles(2, 84)
    with torch.inference_mode():
        assert cosine(model.encode_tiles(tiles), plain.encode_tiles(tiles)) > (0.985 if method == "fp8" else 0.999)
    limit = {"int4": 0.97, "nf4": 0.97, "fp8": 0.99}.get(method, 0.999)
    assert cosine(logits(model), logits(plain)) > limit


def test_no_weight_that_is_rounded_stands_in_the_model_s_dtype() -> None:
    model = rounded(chat_config(), INT4)
    assert not any(name.endswith(("qkv.weight", "down.weight", "fc1.weight")) for name, _ in model.named_parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_weight_is_let_go_as_soon_as_it_is_rounded() -> None:
    config = chat_config()
    came: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in random_weights(config).items():
            copy = tensor.clone()
            came.append(weakref.ref(copy))
            yield name, copy
            del copy
            assert sum(ref() is not None for ref in came) <= 1

    build_model(parse_config(config), tensors(), dtype=torch.float32, device=CPU, quantization=INT4)
    assert len(came) > 50


def test_overrides_except_layers_and_reach_head_and_projector() -> None:
    overrides = {r"layers\.0\.": None, r"projector\.linear_1": "int8", r"head$": "int8-weight"}
    model = rounded(chat_config(), QuantizationConfig("int8", "int8", overrides=overrides))
    methods = methods_of(model)
    assert methods["projector.linear_1"] == "int8"
    assert methods["language_model.head"] == "int8-weight"
    assert "projector.linear_2" not in methods
    assert not any("layers.0." in name for name in methods)
    assert len(methods) == 2 + 2 * 4 + 2 * 4


@pytest.mark.parametrize(
    ("changes", "quantization", "error", "message"),
    [
        ({}, QuantizationConfig("int4"), ConfigError, r"attention\.qkv: groups of 128 do not divide its 64 inputs"),
        ({}, QuantizationConfig("nf4"), ConfigError, r"mlp\.down: groups of 64 do not divide its 112 inputs"),
        ({}, QuantizationConfig("int8", overrides={"lyers": None}), ConfigError, "'lyers' matches no linear layer"),
        (
            {},
            QuantizationConfig(overrides={r"encoder\.layers\.1\.": "nf4"}),
            UnsupportedError,
            r"vision_model\.encoder\.layers\.1\.attn\.qkv: the vision half cannot be nf4",
        ),
        (
            {"llm": {"tie_word_embeddings": True}},
            QuantizationConfig(overrides={"head": "int8"}),
            ConfigError,
            "its weights are those of the embedding",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused_before_a_tensor_is_read(
    changes: dict[str, Any], quantization: QuantizationConfig, error: type[Exception], message: str
) -> None:
    def unread() -> Iterator[tuple[str, Tensor]]:
        yield from ()
        pytest.fail("tensors were read")

    with pytest.raises(error, match=message):
        build_model(
            parse_config(chat_config(**changes)), unread(), dtype=torch.float32, device=CPU, quantization=quantization
        )


@pytest.mark.parametrize(
    ("name", "bad", "message"), [("w2", torch.nan, "not finite"), ("wqkv", 0.0, "holds nothing but zeros")]
)
def test_a_weight_that_cannot_be_rounded_is_named_as_in_the_checkpoint(name: str, bad: float, message: str) -> None:
    config = chat_config()
    weights = random_weights(config)
    key = next(key for key in weights if key.endswith(f"{name}.weight"))
    weights[key] = torch.full_like(weights[key], bad)
    with pytest.raises(CheckpointError, match=rf"language_model\.model\.layers\.0\..*{name}\.weight: .*{message}"):
        build_model(parse_config(config), weights.items(), dtype=torch.float32, device=CPU, quantization=INT4)


def test_a_half_that_the_model_lacks_is_not_quantised() -> None:
    config = parse_config(chat_config()).vision
    with pytest.raises(UnsupportedError, match="int8 for the language half: the model has none"):
        build_model(config, (), dtype=torch.float32, device=CPU, quantization=QuantizationConfig("int8"))


def test_a_weight_that_the_device_s_kernels_refuse_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Int8Weight, *canonical: object) -> None:
        raise ValueError("on a GPU inputs must be multiples of 64")

    monkeypatch.setattr(Int8Weight, "_pack", refuse)
    with pytest.raises(UnsupportedError, match=r"vision_model\.encoder.*qkv \(int8\): on a GPU inputs must be"):
        rounded(chat_config(), QuantizationConfig(vision="int8"))


def test_rounding_warns_once_and_says_how_to_calibrate() -> None:
    with pytest.warns(
        UserWarning, match=r"24 linear layers .*\(int4, int8\) without calibration.*vitrail quantize"
    ) as found:
        rounded(chat_config(), INT4)
    assert len(found) == 1


def test_both_towers_of_a_contrastive_model_are_quantised() -> None:
    config = contrastive_config()
    weights = random_weights(config)
    model, plain = build_contrastive(config, weights), build_contrastive(config, weights)
    quantize_model(model, "int8", "int8")
    methods = methods_of(model)
    assert "qllama.layers.0.cross_attn.kv" in methods and "vision_model.encoder.layers.2.mlp.fc2" in methods
    assert not any(name.startswith(("clip_projector", "itm_head", "qllama.head")) for name in methods)
    tiles = random_tiles(2, 84)
    with torch.inference_mode():
        assert cosine(model.embed_images(tiles, "g"), plain.embed_images(tiles, "g")) > 0.998


# What layers hand to each other


def norms_of(model: InternVLModel) -> list[Any]:
    block, layer = model.vision_model.encoder.layers[0], model.language_model.layers[0]
    return [block.norm1, block.norm2, layer.attention_norm, layer.mlp_norm]


@pytest.mark.parametrize("vision", [None, INTERNVIT_300M])
def test_norms_hand_over_rows_where_their_reader_takes_them(vision: dict[str, Any] | None) -> None:
    config = chat_config(vision=vision)
    model = rounded(config, QuantizationConfig("fp8", "fp8"))
    assert [norm.rows_dtype for norm in norms_of(model)] == [torch.float8_e4m3fn] * 4
    assert model.language_model.norm.rows_dtype is None  # the head is as it was
    assert isinstance(norms_of(model)[0](torch.randn(1, 3, 48)), QuantizedRows)
    tiles = random_tiles(1, 84)
    with torch.inference_mode():
        by_rows = model.encode_tiles(tiles), logits(model)
        for module in model.modules():
            if hasattr(module, "rows_dtype") and not isinstance(module, QuantizedWeight):
                module.rows_dtype = None
        assert torch.equal(by_rows[0], model.encode_tiles(tiles))
        assert torch.equal(by_rows[1], logits(model))


def test_norms_hand_over_numbers_where_their_reader_does_not_take_rows() -> None:
    assert [norm.rows_dtype for norm in norms_of(rounded(chat_config(), INT4))] == [None] * 4


def test_fc1_hands_over_e4m3_of_the_scales_that_fc2_has_taken_up() -> None:
    model = rounded(chat_config(), QuantizationConfig(vision="fp8"))
    mlp = model.vision_model.encoder.layers[0].mlp
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    middle, weight = mlp.fc1(x), torch.randn(48, 80, generator=torch.Generator().manual_seed(1))
    del mlp.fc2.weight
    mlp.fc2.weight = quantize_weight(weight, "fp8", input_scales=middle.abs().amax(0) / 448)
    mlp.fc2.weight.pack()
    connect(model)
    handed = mlp.fc1(x)
    assert isinstance(handed, QuantizedRows)
    assert handed.codes.dtype == torch.float8_e4m3fn
    assert (handed.codes.float().abs().amax(0) == 448).all()
    exact = torch.nn.functional.linear(middle, weight, mlp.fc2.bias)
    assert (mlp(x) - exact).norm() < 0.06 * exact.norm()
    mlp.fc1.weight = quantize_weight(torch.randn(80, 48), "int8")  # makes no e4m3
    connect(model)
    assert mlp.fc1.next_scales is None


def test_fc1_hands_over_codes_of_the_scales_that_fc2_has_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rounded(chat_config(), INT4)
    mlp = model.vision_model.encoder.layers[0].mlp
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    middle = mlp.fc1(x)
    scales = middle.abs().amax(0) / 127
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(1))
    del mlp.fc2.weight
    mlp.fc2.weight = quantize_weight(weight, "int8", input_scales=scales)
    mlp.fc2.weight.pack()
    connect(model)
    assert mlp.fc1.next_scales is None  # on a CPU int8 weights round their inputs themselves
    plain = mlp(x)
    monkeypatch.setattr(Int8Weight, "rows_dtype", torch.int8)
    connect(model)
    assert isinstance(mlp.fc1, LinearGelu) and torch.equal(mlp.fc1.next_scales, scales)
    assert isinstance(mlp.fc1(x), QuantizedRows)
    torch.testing.assert_close(mlp(x), plain, rtol=0.05, atol=0.05 * float(plain.abs().max()))


# Our layout


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("method", [*METHODS, "int4 asymmetric"])
def test_what_is_written_loads_as_it_was(method: str, architecture: str, tmp_path: Path) -> None:
    config = chat_config(architecture, **SMALL)
    method, _, kind = method.partition(" ")
    quantization = QuantizationConfig(method, "int8-weight", 32, not kind, {r"layers\.2\.": None})
    model = rounded(config, quantization, pack=False)
    tensors = dict(checkpoint_tensors(model))
    config |= {"quantization_config": quantization.to_json()}
    assert expected_tensors(config) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, config, tensors, shards=3)
    again = load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=CPU, progress=False)
    assert methods_of(again) == methods_of(model)
    for name in linear_layers(model):
        assert torch.equal(weight_of(again, name), weight_of(model, name)), name


def test_the_layout_is_as_documented() -> None:
    config = chat_config()
    quantization = QuantizationConfig("int4", "int8", 16, symmetric=False)
    tensors = dict(checkpoint_tensors(rounded(config, quantization, pack=False)))
    name, weight = "language_model.model.layers.0.feed_forward.w3.weight", random_weights(config)
    codes, scales, zeros = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "zeros"))
    assert (codes.dtype, scales.dtype, zeros.dtype) == (torch.uint8, torch.float32, torch.uint8)
    for column in (0, 1, 37):
        q = codes[:, column // 2] >> 4 * (column % 2) & 15
        near = scales[:, column // 16] * (q.float() - zeros[:, column // 16].float())
        assert (near - weight[name][:, column]).abs().max() < 0.51 * scales.max()
    name = "vision_model.encoder.layers.1.attn.qkv.weight"
    near = tensors[f"{name}.codes"].float() * tensors[f"{name}.scales"][:, None]
    assert (near - weight[name]).abs().max() < 0.51 * tensors[f"{name}.scales"].max()


def test_input_scales_and_order_are_stored_with_a_weight() -> None:
    config = chat_config()
    quantization = QuantizationConfig(vision="int8")
    model = rounded(config, quantization, pack=False)
    tensors = dict(checkpoint_tensors(model))
    layer = "vision_model.encoder.layers.1.mlp.fc2"
    scales = torch.rand(80) + 0.5
    wide = quantize_weight(random_weights(config)[f"{layer}.weight"], "int8", input_scales=scales)
    tensors |= {f"{layer}.weight.{part}": tensor for part, tensor in wide.named_buffers()}
    stored = stored_format({"quantization_config": quantization.to_json() | {"static_inputs": [layer]}})
    again = build_model(
        parse_config(config), tensors.items(), dtype=torch.float32, device=CPU, stored=stored, pack=False
    )
    assert torch.equal(weight_of(again, layer), wide.dequantize())
    tensors[f"{layer}.weight.scales"] = tensors[f"{layer}.weight.scales"] * torch.nan
    with pytest.raises(CheckpointError, match=rf"{layer}\.weight\.scales: holds scales that are not finite"):
        build_model(parse_config(config), tensors.items(), dtype=torch.float32, device=CPU, stored=stored)


def test_a_layer_that_the_layout_s_config_does_not_name_is_refused() -> None:
    config = chat_config()
    tensors = dict(checkpoint_tensors(rounded(config, QuantizationConfig("int8"), pack=False)))
    says_less = QuantizationConfig("int8", overrides={r"layers\.1\.": None})
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.wqkv is quantised \(weight\.codes\), but"):
        build_model(
            parse_config(config),
            tensors.items(),
            dtype=torch.float32,
            device=CPU,
            stored=stored_format({"quantization_config": says_less.to_json()}),
        )


def test_a_packed_model_is_not_written() -> None:
    with pytest.raises(RuntimeError, match="no canonical form"):
        dict(checkpoint_tensors(rounded(chat_config(), INT4)))


# nano


@pytest.mark.parametrize("method", METHODS)
def test_nano_reads_a_receipt_with_every_method(method: str) -> None:
    vision = None if method in ("int4", "nf4") else method
    with Runtime.from_pretrained(
        "nano", dtype="float32", device="cpu", quantization=method, vision_quantization=vision
    ) as rt:
        assert set(methods_of(rt.model).values()) == {method}
        answers = [
            rt.generate(question, images=str(RECEIPT), max_new_tokens=12).text
            for question in ("What is the total?", "What is the name of the shop?")
        ]
    plain = ["$25.90", ""]
    assert answers[0] == plain[0]


def test_each_half_is_chosen_by_itself() -> None:
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu", vision_quantization="int8") as rt:
        assert methods_of(rt.model) and all(name.startswith("vision_model") for name in methods_of(rt.model))
    config = QuantizationConfig("int4", "int8", group_size=64, overrides={r"mlp\.down": "int8"})
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu", quantization=config) as rt:
        methods = methods_of(rt.model)
        assert methods["language_model.layers.1.mlp.down"] == "int8"
        assert methods["language_model.layers.1.mlp.gate_up"] == "int4"


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="without calibration") as found:
        Runtime.from_pretrained("nano", device="cpu", quantization="int8").close()
    assert [warning.filename for warning in found] == [__file__]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"quantization": "int5"}, ConfigError, "quantization: method 'int5' is not known; known: int8,"),
        ({"vision_quantization": "int4"}, UnsupportedError, "vision_quantization: the vision half cannot be int4"),
        ({"quantization": INT4, "vision_quantization": "int8"}, ConfigError, "goes with a method's name"),
    ],
)
def test_wrong_options_are_refused(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Runtime.from_pretrained("nano", device="cpu", **keywords)


def test_only_llm_int8_keeps_a_model_from_being_captured() -> None:
    config = chat_config(**SMALL)
    assert capturable(rounded(config, QuantizationConfig("int4", "int8", group_size=32)))
    assert not capturable(rounded(config, QuantizationConfig(vision="bnb-int8")))
