"""Linear layers that call the kernels."""

import torch
from torch import Tensor, nn

from ...kernels.linear import linear, linear_gelu
from ...kernels.swiglu import linear_swiglu


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


class LinearSwiglu(nn.Module):
    """SiLU(x Wg^T) * (x Wu^T). weight: (2 * out, in), the rows of the gate first."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear_swiglu(x, self.weight)
