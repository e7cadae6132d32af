"""How far a result is from the exact one, and gradients of an operation."""

from collections.abc import Callable

import torch
from torch import Tensor

# fp32 sums of up to some thousand terms against fp64: roundings of 6e-8 that partly cancel.
FP32_BOUND = 2e-6
# Unit roundoff of bf16: the largest relative error of one rounding.
BF16_ROUNDING = 2**-8


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest deviation, relative to the largest exact value. `exact` is fp64 of the same shape."""
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradients(operation: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum of the result, one per input, in the inputs' dtype."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = operation(*leaves)
    weights = random(*result.shape, seed=99).to(result.dtype)
    (result * weights).sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def check_gradients(operation: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The fp32 gradients of `operation` are those of the fp64 formula."""
    ours = gradients(operation, *inputs)
    theirs = gradients(exact, *(tensor.double() for tensor in inputs))
    assert len(ours) == len(theirs) == len(inputs)
    for gradient, expected in zip(ours, theirs, strict=True):
        # A gradient adds up forward and backward roundings.
        assert relative_error(gradient, expected) < 4 * FP32_BOUND
