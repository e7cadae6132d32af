"""Rounding to nearest by each method, and multiplying by what came of it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.quantize import QuantizedRows
from vitrail.runtime.errors import CheckpointError, ConfigError, UnsupportedError
from vitrail.runtime.quantization import methods
from vitrail.runtime.quantization.bitsandbytes import BnbInt8Weight
from vitrail.runtime.quantization.config import METHODS, QuantizationConfig
from vitrail.runtime.quantization.int4 import pack_nibbles
from vitrail.runtime.quantization.methods import quantize_weight
from vitrail.runtime.quantization.weight import QuantizedWeight, concatenate

# The relative error of a rounded Gaussian weight, in its norm; a third more is a mistake.
ERRORS = {"int8": 0.007, "int8-weight": 0.007, "int4": 0.092, "fp8": 0.027, "nf4": 0.092, "bnb-int8": 0.007}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 128), (40, 256)])
def test_the_rounded_weight_is_near(method: str, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    quantized = quantize_weight(weight, method)
    assert quantized.shape == shape
    assert quantized.method == method
    assert 0.5 * ERRORS[method] < error(quantized.dequantize(), weight) < 1.33 * ERRORS[method]


@pytest.mark.parametrize("method", METHODS)
def test_no_other_code_would_be_nearer(method: str) -> None:
    weight = gaussian(8, 128)
    quantized = quantize_weight(weight, method)
    codes, scales, zeros = quantized.canonical()
    rounding = (quantized.dequantize() - weight).abs()
    neighbours = (-1, 1) if codes.dtype == torch.int8 else (-16, -1, 1, 16)
    for step in neighbours:  # a byte of two codes changes one of them at a time
        raw = codes.view(torch.uint8)
        moved = (raw + step).view(codes.dtype)
        other = (type(quantized)(moved, scales, zeros).dequantize() - weight).abs()
        assert bool((other.nan_to_num(torch.inf) >= rounding * (1 - 1e-5)).all())


def test_asymmetric_groups_reach_from_least_to_largest() -> None:
    weight = gaussian(8, 64).abs() + 0.5  # nothing below zero
    weight[1] *= -1
    near = [
        error(quantize_weight(weight, "int4", group_size=32, symmetric=s).dequantize(), weight) for s in (True, False)
    ]
    assert near[1] < 0.75 * near[0]
    weight = gaussian(8, 64)
    quantized = quantize_weight(weight, "int4", group_size=32, symmetric=False)
    steps = quantized.canonical()[1].repeat_interleave(32, 1)
    assert bool(((quantized.dequantize() - weight).abs() < 0.501 * steps).all())
    weight = gaussian(8, 64).abs() + 0.5
    weight[1] *= -1
    zeros = quantize_weight(weight, "int4", group_size=32, symmetric=False).canonical()[2]
    assert zeros is not None and int(zeros[0].max()) == 0 and int(zeros[1].min()) == 15


def test_the_largest_magnitude_of_a_symmetric_group_is_exact() -> None:
    weight = gaussian(8, 128)
    found = quantize_weight(weight, "int4", group_size=64).dequantize().unflatten(1, (2, 64))
    groups = weight.unflatten(1, (2, 64))
    largest = groups.abs().argmax(2, keepdim=True)
    torch.testing.assert_close(found.gather(2, largest), groups.gather(2, largest))


def test_a_row_of_zeros_is_exact() -> None:
    weight = gaussian(4, 128)
    weight[2] = 0
    for method in METHODS:
        assert not quantize_weight(weight, method).dequantize()[2].any(), method


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_cannot_be_rounded_is_named(method: str) -> None:
    for bad, message in ((torch.nan, "not finite"), (torch.inf, "not finite")):
        weight = gaussian(4, 128)
        weight[1, 3] = bad
        with pytest.raises(CheckpointError, match=rf"blocks\.1\.weight: .*{message}"):
            quantize_weight(weight, method, name="blocks.1.weight")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.weight: holds nothing but zeros"):
        quantize_weight(torch.zeros(4, 128), method, name="blocks.1.weight")


def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"mlp\.down: groups of 128 do not divide its 96 inputs; group_size=32 would"):
        quantize_weight(gaussian(4, 96), "int4", name="mlp.down")
    with pytest.raises(ConfigError, match="groups of 64 do not divide its 96 inputs"):
        quantize_weight(gaussian(4, 96), "nf4")


# Multiplication


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_products_are_those_of_the_dequantised_weight(method: str, shape: tuple[int, int]) -> None:
    weight, bias, x = gaussian(48, 256, seed=1) / 16, gaussian(48, seed=2), gaussian(*shape, 256, seed=3)
    quantized = quantize_weight(weight, method)
    meant = quantized.dequantize()
    plain = F.linear(x, meant, bias)
    gate, up = F.linear(x, meant).chunk(2, -1)
    torch.testing.assert_close(quantized.linear(x, bias), plain)  # before it is packed
    quantized.pack()
    torch.testing.assert_close(quantized.dequantize(), meant)
    limit = {"nf4": 1e-5, "fp8": 0.04}.get(method, 0.01)  # what rounding the activations costs
    assert error(quantized.linear(x, bias), plain) < limit
    gelu = quantized.linear_gelu(x, bias)
    assert isinstance(gelu, Tensor)
    assert error(gelu, F.gelu(plain)) < 1.5 * limit
    assert error(quantized.linear_swiglu(x), F.silu(gate) * up) < 2 * limit
    assert quantized.linear(x.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_are_divided_by_their_scales_and_brought_into_order(packed: bool) -> None:
    weight, x = gaussian(24, 64, seed=1), gaussian(6, 64, seed=2)
    scales = torch.linspace(0.5, 2, 64)
    quantized = quantize_weight(weight, "int8", input_scales=scales)
    assert error(quantized.dequantize(), weight) < 0.012
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    codes, row_scales, _ = quantized.canonical()
    quantized = type(quantized)(codes, row_scales, input_scales=scales, order=order)
    meant = torch.zeros(24, 64)
    for column, source in enumerate(order):
        meant[:, source] = codes[:, column] * row_scales / scales[column]
    torch.testing.assert_close(quantized.dequantize(), meant)
    if packed:
        quantized.pack()
    assert error(quantized.linear(x, None), F.linear(x, meant)) < 0.02
    assert quantized.rows_dtype is None


def test_a_static_weight_takes_codes_without_scales() -> None:
    weight, x = gaussian(24, 64, seed=1), gaussian(6, 64, seed=2)
    scales = x.abs().amax(0) / 127
    quantized = quantize_weight(weight, "int8", input_scales=scales)
    expected = F.linear(x, weight)
    rows = QuantizedRows((x / scales).round().to(torch.int8), None, torch.float32)
    with pytest.raises(ValueError, match="only when it is packed"):
        quantized.linear(rows, None)
    quantized.pack()
    assert error(quantized.linear(rows, None), expected) < 0.02


# Rows


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_weight_and_together_again(method: str) -> None:
    quantized = quantize_weight(gaussian(24, 128), method, symmetric=False)
    order = torch.randperm(24)
    torch.testing.assert_close(quantized.rows(order).dequantize(), quantized.dequantize()[order], equal_nan=False)
    joined = concatenate([quantized.rows(slice(0, 8)), quantized.rows(slice(8, 24))])
    assert isinstance(joined, QuantizedWeight)
    assert torch.equal(joined.dequantize(), quantized.dequantize())


def test_symmetric_and_asymmetric_rows_make_one_weight() -> None:
    parts = [quantize_weight(gaussian(8, 128, seed=s), "int4", symmetric=bool(s)) for s in (0, 1)]
    joined = concatenate(parts)
    assert isinstance(joined, QuantizedWeight)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_pieces_that_do_not_fit_together_are_dequantised() -> None:
    parts = [quantize_weight(gaussian(8, 128), "int4", group_size=size) for size in (32, 64)]
    others = [parts[0], quantize_weight(gaussian(8, 128), "int8"), gaussian(8, 128)]
    for pieces in (parts, others):
        joined = concatenate(pieces)
        assert isinstance(joined, Tensor)
        assert torch.equal(joined, torch.cat([p if isinstance(p, Tensor) else p.dequantize() for p in pieces]))


# bitsandbytes itself


def test_nf4_codes_are_the_library_s() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = gaussian(32, 192)
    codes, scales, _ = quantize_weight(weight, "nf4").canonical()
    theirs, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(codes.flatten(), theirs.flatten())
    torch.testing.assert_close(scales.flatten(), state.absmax)


def test_nf4_products_are_the_library_s() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight, x = gaussian(32, 192), gaussian(5, 192, seed=1)
    quantized = quantize_weight(weight, "nf4")
    quantized.pack()
    theirs, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    torch.testing.assert_close(quantized.linear(x, None), bnb.matmul_4bit(x, theirs.t(), state))


@pytest.mark.parametrize("outlier", [1.0, 20.0])
def test_int8_products_are_the_library_s(outlier: float) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight, x = gaussian(32, 192) / 8, gaussian(5, 192, seed=1).half()
    x[:, 7] *= outlier
    codes, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    ours = quantize_weight(weight.half(), "bnb-int8").canonical()[0]
    assert (ours != codes).float().mean() < 0.01  # the library divides in half precision, and ties fall otherwise
    quantized = BnbInt8Weight(codes, largest / 127)
    quantized.pack()
    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = codes, largest, 6.0, False
    state.is_training = False
    torch.testing.assert_close(quantized.linear(x, None), bnb.matmul(x, codes, state=state), rtol=2e-3, atol=2e-3)


def test_the_library_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.runtime.quantization.bitsandbytes.find_spec", lambda name: None)
    for method in ("nf4", "bnb-int8"):
        with pytest.raises(UnsupportedError, match=r"pip install vitrail\[quant\]"):
            methods.check_device(method, torch.device("cpu"))
    methods.check_device("int4", torch.device("cpu"))


def test_the_library_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys; sys.modules['bitsandbytes'] = None; import vitrail.runtime.weights"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), True), ((9, 0), False)])
def test_fp8_is_refused_by_gpus_without_it(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    cuda = torch.device("cuda")
    methods.check_device("int8", cuda)
    if refused:
        with pytest.raises(UnsupportedError, match=r"fp8 needs a GPU of compute capability 9\.0; A100 has 8\."):
            methods.check_device("fp8", cuda)
    else:
        methods.check_device("fp8", cuda)


def test_groups_that_a_gpu_cannot_run_are_refused() -> None:
    cuda = torch.device("cuda")
    methods.check_inputs("int4", 256, 32, "mlp", cuda)
    methods.check_inputs("int8", 100, 128, "mlp", cuda)
    with pytest.raises(
        UnsupportedError, match=r"mlp: int4 on a GPU .* of 64 and groups of 32; it has 256 inputs in groups of 16"
    ):
        methods.check_inputs("int4", 256, 16, "mlp", cuda)
    with pytest.raises(UnsupportedError, match=r"mlp: int8-weight on a GPU .*; it has 100 inputs$"):
        methods.check_inputs("int8-weight", 100, 128, "mlp", cuda)


def test_nibbles_stand_low_half_first() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)).tolist() == [[0x21, 0xF3]]


# The config


def test_the_config_survives_json() -> None:
    config = QuantizationConfig("int4", "int8", 64, False, {r"layers\.0\.": None, "head": "int8"})
    assert config.to_json()["quant_method"] == "vitrail"
    assert QuantizationConfig.from_json(config.to_json() | {"calibration": "of 64 images"}) == config


@pytest.mark.parametrize(
    ("module", "method"),
    [
        ("language_model.layers.0.attention.qkv", None),
        ("language_model.layers.10.attention.qkv", "int4"),
        ("qllama.layers.1.mlp.down", "int4"),
        ("vision_model.encoder.layers.0.mlp.fc1", "fp8"),
        ("vision_model.encoder.layers.3.mlp.fc2", "int8"),
        ("language_model.head", "int4"),
        ("projector.linear_1", "int8-weight"),
    ],
)
def test_the_first_override_that_matches_decides(module: str, method: str | None) -> None:
    overrides = {r"language_model\.layers\.0\.": None, "fc1": "fp8", "linear_1": "int8-weight", "fc1|head": "int4"}
    assert QuantizationConfig("int4", "int8", overrides=overrides).method_of(module) == method


@pytest.mark.parametrize(
    ("values", "error_type", "message"),
    [
        ({"llm": "int3"}, ConfigError, "method 'int3' is not known"),
        ({"vision": "int4"}, UnsupportedError, "the vision half cannot be int4"),
        ({"vision": "nf4"}, UnsupportedError, "the vision half cannot be nf4"),
        ({"group_size": 20}, ConfigError, "multiple of 8, not 20"),
        ({"group_size": True}, ConfigError, "multiple of 8"),
        ({"symmetric": 1}, ConfigError, "true or false"),
        ({"overrides": {"(": None}}, ConfigError, "not a regular expression"),
        ({"overrides": {"x": "int5"}}, ConfigError, "method 'int5'"),
        ({"overrides": "x"}, ConfigError, "must map"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    values: dict[str, object], error_type: type[Exception], message: str
) -> None:
    with pytest.raises(error_type, match=message):
        QuantizationConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown entries"):
        QuantizationConfig.from_json({"version": 1, "bits": 4})
