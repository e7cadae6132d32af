import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.norm import (
    layer_norm,
    layer_norm_reference,
    residual_norm,
    residual_norm_reference,
    rms_norm,
    rms_norm_reference,
)

from .measure import BF16_ROUNDING, FP32_BOUND, assert_errs_like, check_gradients, on, random, relative_error

# Tiny, odd, and a tile of InternViT-6B.
SHAPES = [(1, 2), (5, 123), (2, 3, 8), (1025, 3200)]
EPSILONS = [1e-6, 1e-5, 0.1]


def exact_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", EPSILONS)
def test_rms_norm_reference_is_the_formula(shape: tuple[int, ...], eps: float) -> None:
    x, weight = random(*shape, scale=3), random(shape[-1], seed=1)
    exact = exact_rms_norm(x.double(), weight.double(), eps)
    assert relative_error(rms_norm_reference(x, weight, eps), exact) < FP32_BOUND


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", EPSILONS)
def test_layer_norm_reference_is_the_formula(shape: tuple[int, ...], eps: float) -> None:
    x, weight, bias = random(*shape, scale=3) + 2, random(shape[-1], seed=1), random(shape[-1], seed=2)
    exact = exact_layer_norm(x.double(), weight.double(), bias.double(), eps)
    assert relative_error(layer_norm_reference(x, weight, bias, eps), exact) < FP32_BOUND


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1e4])
def test_epsilon_is_added_to_the_mean_square(magnitude: float) -> None:
    x, weight, bias = random(5, 123, scale=magnitude), random(123, seed=1), random(123, seed=2)
    exact = exact_rms_norm(x.double(), weight.double(), 1e-6)
    assert relative_error(rms_norm_reference(x, weight, 1e-6), exact) < FP32_BOUND
    exact = exact_layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    assert relative_error(layer_norm_reference(x, weight, bias, 1e-5), exact) < FP32_BOUND


def test_bf16_rms_norm_rounds_twice_and_no_more() -> None:
    x, weight = random(64, 3200).bfloat16(), random(3200, seed=1).bfloat16()
    exact = exact_rms_norm(x.double(), weight.double(), 1e-6)
    error = (rms_norm_reference(x, weight, 1e-6).double() - exact).abs()
    assert (error <= 2.01 * BF16_ROUNDING * exact.abs()).all()


def test_bf16_rms_norm_casts_before_the_weight_as_released_models_do() -> None:
    x, weight = random(64, 3200).bfloat16(), random(3200, seed=1).bfloat16()
    normalized = exact_rms_norm(x.double(), torch.ones(1).double(), 1e-6).float()
    cast_last = (weight.float() * normalized).bfloat16()
    result = rms_norm_reference(x, weight, 1e-6)
    assert result.dtype == torch.bfloat16
    # fp32 statistics may land on the other side of a rounding boundary in one element of some thousand.
    assert (result != weight * normalized.bfloat16()).float().mean() < 1e-3
    assert (result != cast_last).float().mean() > 0.05


def test_bf16_layer_norm_rounds_once() -> None:
    x, weight, bias = (random(64, 1024).bfloat16(), random(1024, seed=1).bfloat16(), random(1024, seed=2).bfloat16())
    exact = exact_layer_norm(x.double(), weight.double(), bias.double(), 1e-6)
    error = (layer_norm_reference(x, weight, bias, 1e-6).double() - exact).abs()
    # Where the bias cancels the product, the fp32 error of the product counts.
    assert (error <= 1.01 * BF16_ROUNDING * exact.abs() + 1e-5).all()


def test_rows_of_zeros_stay_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))
    assert torch.equal(layer_norm(torch.zeros(2, 8), torch.ones(8), torch.ones(8), 1e-6), torch.ones(2, 8))


def test_strided_rows_give_what_packed_rows_give() -> None:
    # q and k are views into one projection of [q | k | v].
    qkv, weight, bias = random(5, 3 * 41), random(41, seed=1), random(41, seed=2)
    for part in qkv.chunk(3, dim=-1):
        assert torch.equal(rms_norm(part, weight, 1e-6), rms_norm(part.contiguous(), weight, 1e-6))
        assert torch.equal(layer_norm(part, weight, bias, 1e-6), layer_norm(part.contiguous(), weight, bias, 1e-6))


def test_on_the_cpu_the_launchers_are_the_references() -> None:
    x, weight, bias = random(5, 123), random(123, seed=1), random(123, seed=2)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    assert torch.equal(layer_norm(x, weight, bias, 1e-6), layer_norm_reference(x, weight, bias, 1e-6))


def test_gradients_flow_to_input_weight_and_bias() -> None:
    x, weight, bias = random(5, 123), random(123, seed=1), random(123, seed=2)
    check_gradients(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: exact_rms_norm(x, w, 1e-5), x, weight)
    check_gradients(
        lambda x, w, b: layer_norm(x, w, b, 1e-5), lambda x, w, b: exact_layer_norm(x, w, b, 1e-5), x, weight, bias
    )


def test_a_weight_of_another_width_is_refused_with_both_widths() -> None:
    with pytest.raises(ValueError, match="rms_norm: x has 8 channels, weight 7"):
        rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="layer_norm: x has 8 channels, weight 1"):
        layer_norm(torch.zeros(2, 8), torch.ones(1), torch.ones(1), 1e-6)


# --- the kernel ---

KERNEL_SHAPES = [(1, 2), (5, 123), (2, 3, 8), pytest.param((64, 3200), id="64 tokens of InternViT-6B")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", KERNEL_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True], ids=["rms_norm", "layer_norm"])
def test_the_norm_kernel_errs_no_more_than_the_reference(any_device, shape, dtype, biased) -> None:
    x, weight = on(any_device, random(*shape, scale=3) + 1, random(shape[-1], seed=1), dtype=dtype)
    bias = on(any_device, random(shape[-1], seed=2), dtype=dtype) if biased else None
    if bias is None:
        result = rms_norm(x, weight, 1e-6)
        exact = exact_rms_norm(x.double(), weight.double(), 1e-6)
        plain = rms_norm_reference(x, weight, 1e-6)
    else:
        result = layer_norm(x, weight, bias, 1e-6)
        exact = exact_layer_norm(x.double(), weight.double(), bias.double(), 1e-6)
        plain = layer_norm_reference(x, weight, bias, 1e-6)
    assert_errs_like(result, plain, exact)


@pytest.mark.parametrize("shape", KERNEL_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_fused_kernel_adds_and_norms_like_the_reference(any_device, shape, dtype, scaled, biased) -> None:
    hidden = shape[-1]
    x, branch, weight = on(any_device, random(*shape), random(*shape, seed=1), random(hidden, seed=2), dtype=dtype)
    scale = on(any_device, random(hidden, seed=3), dtype=dtype) if scaled else None
    bias = on(any_device, random(hidden, seed=4), dtype=dtype) if biased else None
    total, normed = residual_norm(x, branch, scale, weight, bias, 1e-6)
    exact_total = x.double() + branch.double() * (1 if scale is None else scale.double())
    expected_total, expected = residual_norm_reference(x, branch, scale, weight, bias, 1e-6)
    assert_errs_like(total, expected_total, exact_total)
    if bias is None:
        exact = exact_rms_norm(exact_total, weight.double(), 1e-6)
    else:
        exact = exact_layer_norm(exact_total, weight.double(), bias.double(), 1e-6)
    assert_errs_like(normed, expected, exact)


@given(rows=st.integers(1, 4), hidden=st.integers(1, 300), offset=st.integers(0, 3), biased=st.booleans())
def test_the_kernel_norms_rows_of_any_length_inside_a_wider_buffer(interpreted, rows, hidden, offset, biased) -> None:
    buffer = random(rows, hidden + 5, scale=2)
    x, weight, bias = buffer[:, offset : offset + hidden], random(hidden, seed=1), random(hidden, seed=2)
    with interpreted():
        result = layer_norm(x, weight, bias, 1e-5) if biased else rms_norm(x, weight, 1e-5)
    if biased:
        exact = exact_layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    else:
        exact = exact_rms_norm(x.double(), weight.double(), 1e-5)
    assert relative_error(result, exact) < 2 * FP32_BOUND
