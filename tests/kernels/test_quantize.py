import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels import dispatch
from vitrail.kernels.norm import layer_norm, residual_norm, residual_norm_reference, rms_norm, rms_norm_reference
from vitrail.kernels.quantize import (
    LARGEST,
    QuantizedRows,
    quantize_columns_reference,
    quantize_rows,
    quantize_rows_reference,
)

from .measure import random

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
CODES = [INT8, E4M3]
# Tiny, odd, with leading dimensions, and of InternViT-6B.
SHAPES = [(1, 2), (5, 123), (2, 3, 8), pytest.param((16, 3200), id="16 tokens of InternViT-6B")]


def half_steps(rows: QuantizedRows) -> Tensor:
    """Half the distance of neighbouring codes at each code, in numbers."""
    assert rows.scales is not None
    if rows.codes.dtype == INT8:
        step = torch.ones_like(rows.codes, dtype=torch.float64)
    else:  # three bits behind the leading one, and below 2^-6 steps of 2^-9
        step = 2.0 ** (rows.codes.double().abs().clamp(min=2**-6).log2().floor() - 3)
    return step / 2 * rows.scales.double().unsqueeze(-1)


def assert_nearest_codes(rows: QuantizedRows, exact: Tensor, slack: float = 1e-5) -> None:
    """Every code is the nearest one for its row's scale, and each row's largest magnitude has the largest code."""
    assert rows.scales is not None
    assert rows.scales.dtype == torch.float32
    assert rows.shape == exact.shape
    assert rows.scales.shape == exact.shape[:-1]
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(rows.scales.double() * LARGEST[rows.codes.dtype], largest[..., 0], rtol=slack, atol=0)
    error = (rows.codes.double() * rows.scales.double().unsqueeze(-1) - exact).abs()
    assert (error <= half_steps(rows) + slack * largest).all()


# --- the reference ---


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_rounds_to_the_nearest_code(shape, dtype) -> None:
    x = random(*shape, scale=3)
    rows = quantize_rows_reference(x, dtype)
    assert rows.codes.dtype == dtype
    assert_nearest_codes(rows, x.double())


def test_int8_ties_go_to_even_and_the_scale_is_a_127th_of_the_largest() -> None:
    rows = quantize_rows_reference(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, -254.0, 1.0]]))
    assert rows.codes.tolist() == [[127, 0, 2, -2], [0, 0, -127, 0]]
    assert rows.scales is not None
    assert rows.scales.tolist() == [1.0, 2.0]


def test_columns_with_scales_known_beforehand_are_cut_off_at_127() -> None:
    rows = quantize_columns_reference(torch.tensor([[1.0, 1.0, -500.0]]), torch.tensor([0.5, 2.0, 1.0]))
    assert rows.codes.tolist() == [[2, 0, -127]]
    assert rows.scales is None
    assert rows.dequantize().tolist() == [[2.0, 0.0, -127.0]]


def test_only_types_of_codes_are_taken_and_e4m3_only_where_a_gpu_has_it() -> None:
    with pytest.raises(ValueError, match=r"codes are int8 or float8_e4m3fn, not torch\.uint8"):
        quantize_rows(random(2, 4), torch.uint8)
    with dispatch.simulate(dispatch.A100), pytest.raises(ValueError, match=r"capability 9\.0; NVIDIA A100.* sm_80"):
        rms_norm(random(2, 4), random(4), 1e-6, quantize=E4M3)


# --- the kernels ---


def skip_without_fp8(device: torch.device, dtype: torch.dtype) -> None:
    target = dispatch.target_of(torch.empty(0, device=device))
    if dtype == E4M3 and target is not None and target.arch != "sm_90":
        pytest.skip("e4m3 needs a Hopper")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", CODES)
def test_the_kernel_rounds_to_the_nearest_code(device, shape, x_dtype, dtype) -> None:
    skip_without_fp8(device, dtype)
    x = random(*shape, scale=3).to(device, x_dtype)
    rows = quantize_rows(x, dtype)
    assert (rows.dtype, rows.codes.dtype) == (x_dtype, dtype)
    assert_nearest_codes(rows, x.double())


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", CODES)
def test_rows_that_are_not_finite_say_so_and_rows_of_nothing_are_zero(device, dtype) -> None:
    skip_without_fp8(device, dtype)
    x = random(6, 40).to(device)
    x[0, 7], x[1, 0], x[2, 39] = torch.nan, torch.inf, -torch.inf
    x[3], x[4] = 0.0, -1e-38
    for rows in (quantize_rows(x, dtype), quantize_rows_reference(x, dtype)):
        assert rows.scales is not None
        assert rows.scales[:3].isnan().all()
        assert rows.dequantize()[3:5].eq(0).all()
        assert rows.dequantize()[5].isfinite().all()


@settings(max_examples=30)
@given(
    rows=st.integers(1, 4),
    channels=st.integers(1, 300),
    offset=st.integers(0, 3),
    magnitude=st.sampled_from([1e-25, 1e-3, 1.0, 1e30]),
    dtype=st.sampled_from(CODES),
)
def test_rows_of_any_length_and_magnitude_inside_a_wider_buffer(
    interpreted, rows, channels, offset, magnitude, dtype
) -> None:
    buffer = torch.full((rows, channels + 5), torch.nan)
    x = buffer[:, offset : offset + channels].copy_(random(rows, channels, seed=channels, scale=magnitude))
    with interpreted(), dispatch.simulate(dispatch.H200):
        assert_nearest_codes(quantize_rows(x, dtype), x.double())


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("biased", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize("hidden", [3, 200])
def test_a_norm_gives_the_codes_of_its_result(device, dtype, biased, hidden) -> None:
    skip_without_fp8(device, dtype)
    x, weight = random(7, hidden, scale=3).to(device) + 1, random(hidden, seed=1).to(device)
    bias = random(hidden, seed=2).to(device)
    if biased:
        rows = layer_norm(x, weight, bias, 1e-5, quantize=dtype)
        exact = torch.nn.functional.layer_norm(x.double(), (hidden,), weight.double(), bias.double(), 1e-5)
    else:
        rows = rms_norm(x, weight, 1e-5, quantize=dtype)
        exact = torch.nn.functional.rms_norm(x.double(), (hidden,), weight.double(), 1e-5)
    assert_nearest_codes(rows, exact)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_fused_kernel_stores_the_sum_and_the_codes_of_its_norm(device, dtype, biased, scaled) -> None:
    skip_without_fp8(device, dtype)
    x, branch, weight, scale, bias = (random(*shape, seed=seed).to(device, torch.bfloat16) for seed, shape in
                                      enumerate([(2, 3, 136), (2, 3, 136), (136,), (136,), (136,)]))  # fmt: skip
    arguments = (x, branch, scale if scaled else None, weight, bias if biased else None, 1e-6)
    total, rows = residual_norm(*arguments, quantize=dtype)
    expected, normed = residual_norm_reference(*arguments)
    assert torch.equal(total, expected)
    # The norm's own roundings to bf16 show in the codes.
    assert_nearest_codes(rows, normed.double(), slack=2**-7)


def test_what_a_norm_quantises_on_a_cpu_are_the_codes_of_its_reference() -> None:
    x, weight = random(5, 24).bfloat16(), random(24, seed=1).bfloat16()
    rows, expected = (
        rms_norm(x, weight, 1e-6, quantize=INT8),
        quantize_rows_reference(rms_norm_reference(x, weight, 1e-6)),
    )
    assert torch.equal(rows.codes, expected.codes)
    assert rows.scales is not None and expected.scales is not None
    assert torch.equal(rows.scales, expected.scales)
    assert rows.dtype == torch.bfloat16
