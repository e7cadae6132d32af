"""Mistakes put into real kernels: the checks of this folder must notice each of them.

Values are checked under Triton's interpreter, resources in compiled binaries. A mistake is a line of a kernel's source,
replaced; if the line is gone, the test says so and wants another.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vitrail.kernels import dequantize, dispatch, gemm, norm, quantize, scaled_gemm
from vitrail.kernels.build import Compiled, KernelError, check, compile_launches
from vitrail.kernels.int4_decode import DecodeWeight
from vitrail.kernels.quantize import QuantizedRows
from vitrail.kernels.signature import Launch

from .local_kernels import with_line_replaced
from .measure import assert_errs_like, random

SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}


# --- values ---


def wide_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows in the middle of a wider buffer of NaN, which is what a mistake reads beside them."""
    buffer = torch.full((rows + 2, columns + 48), torch.nan, dtype=dtype)
    buffer[1:-1, 16 : 16 + columns] = random(rows, columns)
    return buffer[1:-1, 16 : 16 + columns]


def check_norm(module: ModuleType) -> None:
    x, weight = wide_rows(5, 123, torch.float32), random(123, seed=1)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_errs_like(module.rms_norm(x, weight, 1e-6), norm.rms_norm_reference(x, weight, 1e-6), exact)


def check_gemm(module: ModuleType) -> None:
    x, weight = wide_rows(70, 80, torch.bfloat16), wide_rows(72, 80, torch.bfloat16)
    bias = random(72, seed=2).bfloat16()
    choice = {"implementation": "pipelined", **SMALL}
    result = module.gemm("gelu", dispatch.A100, x, weight, bias, choice)
    exact = torch.nn.functional.gelu(x.double() @ weight.double().t() + bias.double())
    assert_errs_like(result, torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias)), exact)


def check_quantize(module: ModuleType) -> None:
    x = wide_rows(5, 123, torch.float32) - 1  # what is largest is negative
    rows = module.quantize_rows(x)
    assert ((rows.codes * rows.scales[:, None] - x).abs() <= 0.501 * x.abs().amax(1, keepdim=True) / 127).all()


def check_scaled_gemm(module: ModuleType) -> None:
    codes = [
        random(*shape, seed=seed, scale=40).round().to(torch.int8) for seed, shape in enumerate([(70, 80), (72, 80)])
    ]
    x = QuantizedRows(codes[0], random(70, seed=2).abs(), torch.float32)
    scales, bias, next_scales = random(72, seed=3).abs() / 1600, random(72, seed=4), random(72, seed=5).abs() + 0.1
    with dispatch.override("int8_linear_gelu", {"implementation": "pipelined", **SMALL}):
        result = module.scaled_linear(
            dispatch.A100, x, codes[1], scales, bias, epilogue="gelu", next_scales=next_scales
        )
    exact = torch.nn.functional.gelu(x.dequantize().double() @ (codes[1] * scales[:, None]).double().t() + bias)
    assert ((result - (exact / next_scales).clamp(-127, 127)).abs() <= 0.51).all()


def check_dequantize(module: ModuleType) -> None:
    codes = torch.randint(0, 16, (40, 192), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight = DecodeWeight(codes, random(40, 3).abs() + 0.01, codes[:, :3] % 9)
    x = random(5, 192, seed=1).bfloat16()
    assert torch.equal(module.dequantize(weight, torch.float32), weight.dequantize())
    exact = x.double() @ weight.dequantize().double().t()
    assert_errs_like(module.few_rows_linear(x, weight), x @ weight.dequantize().bfloat16().t(), exact)


NORM_LOAD = "x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)"
NORM_MEAN = "y = (x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)).to(x_ptr.dtype.element_ty).to(tl.float32)"
GEMM_POINTERS = "weight_ptrs = weight_ptr + weight_rows[None, :] * weight_stride + inner[:, None]"
VALUE_FAULTS = {
    "dropped mask of a row": (norm, check_norm, NORM_LOAD, NORM_LOAD.replace("mask=inside, other=0.0", "")),
    "other rows' stride": (norm, check_norm, NORM_LOAD, NORM_LOAD.replace("x_stride", "hidden")),
    "mean over the block": (norm, check_norm, NORM_MEAN, NORM_MEAN.replace("hidden", "BLOCK")),
    "dropped mask of the inner axis": (
        *(gemm, check_gemm, "a = tl.load(x_ptrs, mask=inside[None, :], other=0.0)"),
        "a = tl.load(x_ptrs)",
    ),
    "wrong stride of the weight": (gemm, check_gemm, GEMM_POINTERS, GEMM_POINTERS.replace("weight_stride", "k")),
    "the largest number for the largest magnitude": (
        *(quantize, check_quantize, "return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF"),
        "return x.to(tl.int32, bitcast=True)",
    ),
    "codes cut off where they should be rounded": (
        *(quantize, check_quantize, "return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)"),
        "return x.to(tl.int8)",
    ),
    "rows without their scales": (scaled_gemm, check_scaled_gemm, "y *= x_scales", "y *= 1.0"),
    "codes that wrap around": (
        *(scaled_gemm, check_scaled_gemm, "return to_codes(tl.minimum(tl.maximum(y, -largest), largest), dtype)"),
        "return to_codes(y, dtype)",
    ),
    "another group's scale": (
        *(
            dequantize,
            check_dequantize,
            "scales, zeros = _scales_and_zeros(tl.load(scale_words_ptrs + step // units_per_group * 16))",
        ),
        "scales, zeros = _scales_and_zeros(tl.load(scale_words_ptrs))",
    ),
    "inputs in the order of bytes": (
        *(dequantize, check_dequantize, "return words & 15, words >> 4"),
        "return words.reshape(ROWS, STEPS * 16, 2, 2).permute(0, 1, 3, 2).reshape(ROWS, STEPS * 64) & 15, words >> 4",
    ),
}
REAL = {
    check_norm: norm,
    check_gemm: gemm,
    check_quantize: quantize,
    check_scaled_gemm: scaled_gemm,
    check_dequantize: dequantize,
}


@pytest.mark.parametrize("check_values", REAL)
def test_the_real_kernels_pass_what_the_faulty_ones_fail(interpreted, check_values) -> None:
    with interpreted():
        check_values(REAL[check_values])


@pytest.mark.parametrize("fault", VALUE_FAULTS)
def test_a_fault_in_the_values_is_noticed(interpreted, tmp_path: Path, fault: str) -> None:
    module, check_values, line, by = VALUE_FAULTS[fault]
    faulty = with_line_replaced(module, line, by, tmp_path)
    with interpreted(), pytest.raises(AssertionError):
        check_values(faulty)


# --- resources ---


def recorded_gemm(module: ModuleType, arch: dispatch.Arch) -> Launch:
    """A launch at the size of InternViT-300M's fc1, with small blocks."""
    launches: list[Launch] = []
    with torch.device("meta"), dispatch.simulate(dispatch.REPRESENTATIVE[arch], launches):
        x, weight, bias = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((1025, 1024), (4096, 1024), (4096,)))
        module.gemm("gelu", dispatch.REPRESENTATIVE[arch], x, weight, bias, {"implementation": "pipelined", **SMALL})
    return launches[0]


def recorded_norm(module: ModuleType, arch: dispatch.Arch) -> Launch:
    """A launch at the size of InternViT-6B."""
    launches: list[Launch] = []
    with torch.device("meta"), dispatch.simulate(dispatch.REPRESENTATIVE[arch], launches):
        x, weight = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((7, 1025, 3200), (3200,)))
        module.residual_norm(x, x, weight, weight, None, 1e-6)
    return launches[0]


def times(factor: int, block: str, launch: Launch) -> Launch:
    constants = dict(launch.constants)
    return replace(launch, constants=tuple((constants | {block: factor * constants[block]}).items()))


def recorded_scaled_gemm(module: ModuleType, arch: dispatch.Arch, block: int) -> Launch:
    """A launch at the size of InternViT-300M's fc1, which leaves codes."""
    launches: list[Launch] = []
    choice = {"implementation": "pipelined", **SMALL, "BLOCK_M": block, "BLOCK_N": block}
    with torch.device("meta"), dispatch.simulate(dispatch.REPRESENTATIVE[arch], launches):
        rows = QuantizedRows(torch.empty(1025, 1024, dtype=torch.int8), torch.empty(1025), torch.bfloat16)
        weight, scales = torch.empty(4096, 1024, dtype=torch.int8), torch.empty(4096)
        with dispatch.override("int8_linear_gelu", choice):
            target = dispatch.REPRESENTATIVE[arch]
            module.scaled_linear(target, rows, weight, scales, scales, epilogue="gelu", next_scales=scales)
    return launches[0]


DOT = 'acc = tl.dot(a, b, acc, input_precision="ieee")'
SCALED_DOT = "acc = tl.dot(a, b, acc, out_dtype=sums)"
RESOURCE_FAULTS = {
    ("a block 8 times as deep", "sm_80"): "196608 bytes of shared memory, where sm_80 has 166912",
    ("a block 8 times as deep", "sm_90"): "262144 bytes of shared memory, where sm_90 has 232448",
    ("16 times the row for a warp", "sm_80"): r"[1-9]\d* bytes of stack a thread",
    ("products of widened operands", "sm_80"): "no tensor core computes the product",
    ("products of widened operands", "sm_90"): "no tensor core computes the product",
    ("codes multiplied as numbers", "sm_80"): "no tensor core computes the product",
    ("a tile of codes for twice the warps", "sm_80"): r"[1-9]\d* bytes of stack a thread",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, dispatch.Arch], Compiled]:
    """The faulty kernels compiled, by fault and architecture."""
    widened = DOT.replace("(a, b,", "(a.to(tl.float32), b.to(tl.float32),")
    faulty_gemm = with_line_replaced(gemm, DOT, widened, tmp_path_factory.mktemp("gemm"))
    numbers = "acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision='ieee').to(sums)"
    as_numbers = with_line_replaced(scaled_gemm, SCALED_DOT, numbers, tmp_path_factory.mktemp("scaled_gemm"))
    launches: dict[str, Callable[[dispatch.Arch], Launch]] = {
        "a block 8 times as deep": lambda arch: times(8, "BLOCK_K", recorded_gemm(gemm, arch)),
        "16 times the row for a warp": lambda arch: replace(times(8, "BLOCK", recorded_norm(norm, arch)), num_warps=4),
        "products of widened operands": lambda arch: recorded_gemm(faulty_gemm, arch),
        "codes multiplied as numbers": lambda arch: recorded_scaled_gemm(as_numbers, arch, 32),
        "a tile of codes for twice the warps": lambda arch: recorded_scaled_gemm(scaled_gemm, arch, 128),
    }
    pairs = list(RESOURCE_FAULTS)
    found = compile_launches([(launches[fault](arch), arch) for fault, arch in pairs], jobs=2)
    return {pairs[index]: compiled for index, compiled in found}


@pytest.mark.parametrize(("fault", "arch"), RESOURCE_FAULTS)
def test_a_fault_in_the_resources_is_noticed(built, fault: str, arch: dispatch.Arch) -> None:
    with pytest.raises(KernelError, match=RESOURCE_FAULTS[fault, arch]):
        check(built[fault, arch])
