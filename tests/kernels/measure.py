"""How far a result is from the exact one, and gradients of an operation."""

from collections.abc import Callable
from typing import Any

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


def assert_errs_like(result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """A kernel may err at most twice as much as plain torch in the same dtype, both against fp64.

    Both errors are root mean squares. One rounding is allowed besides, where plain torch happens to be exact; in fp32,
    where factors that a whole row shares are rounded too, a whole unit.
    """
    assert result.dtype == plain.dtype
    assert result.shape == plain.shape == exact.shape
    assert result.isfinite().all()
    scale = exact.double().square().mean().sqrt().item()
    error, allowed = ((t.double() - exact).square().mean().sqrt().item() for t in (result, plain))
    eps = torch.finfo(result.dtype).eps
    rounding = (eps if result.dtype == torch.float32 else eps / 4) * scale
    assert error <= 2 * allowed + rounding, f"{error} against {allowed} of {scale}"


def on(device: torch.device, *tensors: Tensor, dtype: torch.dtype) -> Any:
    """The tensors on `device` in `dtype`; one alone comes back alone."""
    moved = [tensor.to(device, dtype) for tensor in tensors]
    return moved[0] if len(moved) == 1 else moved


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
