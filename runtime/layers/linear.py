"""A linear layer that calls the kernels."""

import torch
from torch import Tensor, nn

from ...kernels.linear import linear, linear_gelu


class Linear(nn.Module):
    """y = x W^T + b. weight: (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LinearGelu(nn.Module):
    """GELU(x W^T + b), erf form. weight: (out, in)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear_gelu(x, self.weight, self.bias)
