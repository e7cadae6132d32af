import pytest
import torch

from vitrail.kernels.residual import scaled_residual, scaled_residual_reference

from .measure import BF16_ROUNDING, FP32_BOUND, check_gradients, random, relative_error


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
