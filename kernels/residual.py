"""LayerScale and residual in one pass: y = x + scale * branch."""

import torch
from torch import Tensor


def scaled_residual(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """Add a LayerScale'd branch to the residual. x, branch: (..., hidden); scale: (hidden,)."""
    if x.shape != branch.shape:
        raise ValueError(f"scaled_residual: x is {tuple(x.shape)}, branch {tuple(branch.shape)}")
    return scaled_residual_reference(x, branch, scale)


def scaled_residual_reference(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x, branch, scale)
