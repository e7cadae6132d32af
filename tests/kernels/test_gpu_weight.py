import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels import dispatch
from vitrail.kernels.gpu_weight import ScaledWeight, WeightOnly
from vitrail.kernels.packed_weight import PackedWeight
from vitrail.kernels.quantize import QuantizedRows, quantize_rows, quantize_rows_reference
from vitrail.kernels.quantized_linear import pack_fp8, pack_int4, pack_int8
from vitrail.kernels.signature import Launch

from .measure import random

IN, OUT = 128, 96
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


def packed(method: str, device: torch.device | str = "cpu") -> PackedWeight:
    codes, scales = quantize_rows_reference(random(OUT, IN, seed=1, scale=IN**-0.5))[:2]
    assert scales is not None
    if method == "int4":
        nibbles = (codes.int() // 16 + 8).to(torch.uint8)
        return pack_int4(nibbles.to(device), (scales[:, None] * 16).expand(-1, 2).contiguous().to(device))
    if method == "fp8":
        codes, scales = quantize_rows_reference(random(OUT, IN, seed=1, scale=IN**-0.5), E4M3)[:2]
        assert scales is not None
        return pack_fp8(codes.to(device), scales.to(device))
    return pack_int8(codes.to(device), scales.to(device), weight_only=method == "int8 weights")


METHODS = ["int8", "int8 weights", "int4", "fp8"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, device: torch.device) -> str:
    target = dispatch.target_of(torch.empty(0, device=device))
    if request.param == "fp8" and target is not None and target.arch != "sm_90":
        pytest.skip("e4m3 needs a Hopper")
    return request.param


def as_it_reads(weight: PackedWeight, x: Tensor) -> Tensor:
    """x as the product takes it, fp64."""
    if weight.rows_dtype is None:
        return x.double()
    return quantize_rows_reference(x, weight.rows_dtype).dequantize().double()


@pytest.mark.parametrize("rows", [1, 40])
def test_a_weight_packed_for_a_gpu_is_the_formula_with_every_epilogue(device, method, rows) -> None:
    weight, x = packed(method, device), random(rows, IN, seed=2).to(device, torch.bfloat16)
    bias, exact_weight = random(OUT, seed=3).to(device, torch.bfloat16), weight.dequantize().double()
    exact = F.linear(as_it_reads(weight, x), exact_weight, bias.double())

    def check(result: Tensor | QuantizedRows, expected: Tensor) -> None:
        assert isinstance(result, Tensor)
        assert result.dtype == torch.bfloat16
        # Weights of 4 bits are rounded to bf16 on the way to the library; a code may fall to the other side of a tie.
        assert (result.double() - expected).abs().mean() < 2**-8 * expected.abs().mean()

    check(weight.linear(x, bias), exact)
    check(weight.linear_gelu(x, bias), F.gelu(exact))
    gate, up = F.linear(as_it_reads(weight, x), exact_weight).chunk(2, dim=-1)
    check(weight.linear_swiglu(x), F.silu(gate) * up)
    assert weight.linear(x, out_dtype=torch.float32).dtype == torch.float32


def test_rows_may_come_as_codes_and_leave_as_codes(device, method) -> None:
    weight, x = packed(method, device), random(2, 3, IN, seed=2).to(device, torch.bfloat16)
    bias = random(OUT, seed=3).to(device, torch.bfloat16)
    rows = quantize_rows(x, weight.rows_dtype or INT8)
    numbers = weight.linear(x if weight.takes_rows else rows.dequantize().to(x.dtype), bias)
    result = weight.linear(rows, bias)
    assert (result.dtype, result.shape) == (torch.bfloat16, (2, 3, OUT))
    assert torch.equal(result, numbers)
    scales = (random(OUT, seed=4).abs() * 0.02 + 0.001).to(device)
    left = weight.linear_gelu(rows, bias, scales)
    assert isinstance(left, QuantizedRows)
    assert (left.codes.dtype, left.scales, left.dtype) == (weight.rows_dtype or INT8, None, torch.bfloat16)
    expected = weight.linear_gelu(rows, bias)
    assert isinstance(expected, Tensor)
    largest, relative, absolute = (448, 2**-4, 2**-10) if method == "fp8" else (127, 0, 0.5)
    steps = (expected.double() / scales).clamp(-largest, largest)
    assert ((left.codes.double() - steps).abs() <= absolute + (relative + 2**-8) * steps.abs() + 1e-3).all()


def test_what_is_packed_tells_what_it_takes(device, method) -> None:
    weight = packed(method, device)
    assert (weight.in_features, weight.out_features) == (IN, OUT)
    assert weight.bits == (4 if method == "int4" else 8)
    assert weight.rows_dtype == {"int8": INT8, "fp8": E4M3}.get(method)
    assert isinstance(weight, ScaledWeight if weight.takes_rows else WeightOnly)


@pytest.mark.parametrize("method", METHODS)
def test_weights_on_a_cpu_have_the_same_face(method) -> None:
    weight, x, bias = packed(method), random(5, IN, seed=2), random(OUT, seed=3)
    plain = F.linear(x, weight.dequantize(), bias)
    # What rounding activations to 8 bits costs.
    assert (weight.linear(x, bias) - plain).abs().mean() < 0.04 * plain.abs().mean()
    for dtype in (INT8, E4M3) if not weight.takes_rows else (weight.rows_dtype,):
        assert dtype is not None
        rows = quantize_rows(x, dtype)
        result = weight.linear(rows, bias)
        assert (result - F.linear(rows.dequantize(), weight.dequantize(), bias)).abs().max() < 0.04
    left = weight.linear_gelu(x, bias, torch.full((OUT,), 0.02))
    assert isinstance(left, QuantizedRows)
    largest, relative = (8.96, 2**-4) if method == "fp8" else (2.54, 0)
    expected = F.gelu(weight.linear(x, bias)).clamp(-largest, largest)
    assert ((left.dequantize() * 0.02 - expected).abs() <= 0.0101 + relative * expected.abs()).all()
    assert torch.allclose(
        weight.linear_swiglu(x), F.silu(weight.linear(x)[:, : OUT // 2]) * weight.linear(x)[:, OUT // 2 :]
    )


def test_codes_of_scales_known_beforehand_are_multiplied_exactly_on_a_cpu() -> None:
    weight, rows = packed("int8"), QuantizedRows(torch.tensor([[3, -100] * (IN // 2)], dtype=INT8), None, torch.float32)
    exact = rows.codes.double() @ weight.dequantize().double().T
    assert torch.allclose(weight.linear(rows).double(), exact, rtol=1e-5, atol=1e-3)


def recorded(target: dispatch.Target, method: str, rows: int) -> list[str]:
    launches: list[Launch] = []
    with torch.device("meta"), dispatch.simulate(target, launches):
        codes, scales = torch.empty(256, 128, dtype=E4M3 if method == "fp8" else INT8), torch.empty(256)
        pack = pack_fp8 if method == "fp8" else pack_int8
        weight = pack(codes, scales)
        x = torch.empty(rows, 128, dtype=torch.bfloat16)
        weight.linear_gelu(x, torch.empty(256, dtype=torch.bfloat16))
        weight.linear(quantize_rows(x, codes.dtype))
    return [launch.name for launch in launches]


def test_launches_are_recorded_without_memory() -> None:
    assert recorded(dispatch.A100, "int8", 7175) == ["_quantize_rows_kernel", "_scaled_pipelined_kernel"] * 2
    for method in ("int8", "fp8"):
        assert recorded(dispatch.H200, method, 7175) == ["_quantize_rows_kernel", "_scaled_persistent_kernel"] * 2


def test_sizes_and_devices_that_do_not_fit_are_refused(any_device) -> None:
    nibbles, scales = torch.zeros(8, 96, dtype=torch.uint8, device=any_device), torch.ones(8, 3, device=any_device)
    with pytest.raises(ValueError, match="inputs must be multiples of 64 and groups of 32, not 96 and 32"):
        pack_int4(nibbles, scales)
    with pytest.raises(ValueError, match="groups of 32, not 96 and 96"):
        pack_int8(nibbles.to(INT8), scales[:, 0], weight_only=True)
    with pytest.raises(ValueError, match=r"scales \(8, 3\) do not fit a weight \(8, 96\)"):
        pack_int8(nibbles.to(INT8), scales)
    weight = pack_int8(nibbles.to(INT8), scales[:, 0])
    with pytest.raises(ValueError, match=r"x has 95 channels, the weight is \(8, 96\), bias None"):
        weight.linear(torch.zeros(2, 95, device=any_device))
    with pytest.raises(ValueError, match=r"rows of torch\.float8_e4m3fn, the weight takes torch\.int8"):
        weight.linear(QuantizedRows(torch.zeros(2, 96, dtype=E4M3, device=any_device), None, torch.bfloat16))


def test_fp8_is_refused_where_the_gpu_has_none() -> None:
    with dispatch.simulate(dispatch.A100), pytest.raises(ValueError, match=r"needs a GPU of compute capability 9\.0"):
        pack_fp8(torch.zeros(8, 96).to(E4M3), torch.ones(8))
