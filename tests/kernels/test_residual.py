import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.kernels.residual import scaled_residual, scaled_residual_reference

from .measure import BF16_ROUNDING, FP32_BOUND, assert_errs_like, check_gradients, on, random, relative_error


# Tiny, odd, and a tile of InternViT-6B.
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (1, 1025, 3200)])
def test_reference_is_the_formula(shape: tuple[int, ...]) -> None:
    x, branch, scale = random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)
    exact = x.double() + scale.double() * branch.double()
    assert relative_error(scaled_residual_reference(x, branch, scale), exact) < FP32_BOUND


def test_bf16_rounds_no_more_than_the_plain_two_steps_do() -> None:
    x, branch, scale = (random(64, 3200, seed=s).bfloat16() for s in (0, 1, 2))
    exact = x.double() + scale[0].double() * branch.double()
    error = (scaled_residual_reference(x, branch, scale[0]).double() - exact).abs()
    # One rounding of the product, one of the sum.
    product = (scale[0].double() * branch.double()).abs()
    assert (error <= 1.02 * BF16_ROUNDING * (product + exact.abs())).all()


def test_on_the_cpu_the_launcher_is_the_reference_and_leaves_its_inputs() -> None:
    x, branch, scale = random(5, 123), random(5, 123, seed=1), random(123, seed=2)
    before = x.clone(), branch.clone()
    assert torch.equal(scaled_residual(x, branch, scale), scaled_residual_reference(x, branch, scale))
    assert torch.equal(x, before[0])
    assert torch.equal(branch, before[1])


def test_gradients_flow_to_residual_branch_and_scale() -> None:
    inputs = random(5, 123), random(5, 123, seed=1), random(123, seed=2)
    check_gradients(scaled_residual, lambda x, branch, scale: x + scale * branch, *inputs)


def test_branches_of_another_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"scaled_residual: x is \(2, 8\), branch \(1, 8\)"):
        scaled_residual(torch.zeros(2, 8), torch.zeros(1, 8), torch.ones(8))


# --- the kernel ---


@pytest.mark.parametrize("shape", [(1, 2), (5, 123), (2, 3, 8), pytest.param((16, 3200), id="16 tokens of the 6B")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_errs_no_more_than_the_reference_and_leaves_its_inputs(any_device, shape, dtype) -> None:
    x, branch, scale = on(any_device, random(*shape), random(*shape, seed=1), random(shape[-1], seed=2), dtype=dtype)
    before = x.clone(), branch.clone()
    exact = x.double() + scale.double() * branch.double()
    assert_errs_like(scaled_residual(x, branch, scale), scaled_residual_reference(x, branch, scale), exact)
    assert torch.equal(x, before[0])
    assert torch.equal(branch, before[1])


def test_the_kernel_rounds_once(any_device) -> None:
    x, branch, scale = on(any_device, *(random(16, 400, seed=s) for s in (0, 1, 2)), dtype=torch.bfloat16)
    exact = x.double() + scale[0].double() * branch.double()
    error = (scaled_residual(x, branch, scale[0]).double() - exact).abs()
    # Where the two cancel, the fp32 error of the product counts.
    assert (error <= 1.01 * BF16_ROUNDING * exact.abs() + 1e-6).all()


@settings(max_examples=30)
@given(rows=st.integers(1, 4), hidden=st.integers(1, 300), transposed=st.booleans())
def test_the_kernel_adds_rows_of_any_length_and_order(interpreted, rows, hidden, transposed) -> None:
    x, scale = random(rows, hidden), random(hidden, seed=2)
    branch = random(hidden, rows, seed=1).t() if transposed else random(rows, hidden, seed=1)
    with interpreted():
        result = scaled_residual(x, branch, scale)
    assert relative_error(result, x.double() + scale.double() * branch.double()) < FP32_BOUND
