"""Normalisation layers that call the kernels."""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.norm import layer_norm, residual_norm, rms_norm
from ...kernels.quantize import QuantizedRows
from ..config import NormType


class RMSNorm(nn.Module):
    """RMSNorm over the last dim; fp32 statistics.

    rows_dtype: the codes that the only reader of the result wants, which then comes as QuantizedRows.
    """

    rows_dtype: torch.dtype | None = None

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor | QuantizedRows:
        return rms_norm(x, self.weight, self.eps, quantize=self.rows_dtype)

    def after_residual(self, x: Tensor, branch: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Any]:
        """(x', norm(x')) for x' = x + scale * branch. x, branch: (..., size); scale: (size,) or None for 1."""
        return residual_norm(x, branch, scale, self.weight, None, self.eps, quantize=self.rows_dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last dim; fp32 statistics. rows_dtype: as in RMSNorm."""

    rows_dtype: torch.dtype | None = None

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor | QuantizedRows:
        return layer_norm(x, self.weight, self.bias, self.eps, quantize=self.rows_dtype)

    def after_residual(self, x: Tensor, branch: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Any]:
        """(x', norm(x')) for x' = x + scale * branch. x, branch: (..., size); scale: (size,) or None for 1."""
        return residual_norm(x, branch, scale, self.weight, self.bias, self.eps, quantize=self.rows_dtype)


def make_norm(kind: NormType, size: int, eps: float) -> RMSNorm | LayerNorm:
    """The block norm that an InternViT's config asks for."""
    return RMSNorm(size, eps) if kind == "rms_norm" else LayerNorm(size, eps)
