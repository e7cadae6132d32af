"""Linear layers that call the kernels, or the quantised weight that stands in place of the parameter."""

from typing import cast

import torch
from torch import Tensor, nn

from ...kernels.linear import linear, linear_gelu
from ...kernels.quantize import QuantizedRows
from ...kernels.swiglu import linear_swiglu
from ..quantization.weight import QuantizedWeight


class Linear(nn.Module):
    """y = x W^T + b. weight: (out, in)."""

    weight: nn.Parameter | QuantizedWeight

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.linear(x, self.bias)
        return linear(cast(Tensor, x), self.weight, self.bias)


class LinearGelu(nn.Module):
    """GELU(x W^T + b), erf form. weight: (out, in).

    next_scales: those of the inputs of the layer behind, where that one takes rows of scales known beforehand.
    """

    weight: nn.Parameter | QuantizedWeight

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.next_scales: Tensor | None = None

    def forward(self, x: Tensor | QuantizedRows) -> Tensor | QuantizedRows:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.linear_gelu(x, self.bias, self.next_scales)
        return linear_gelu(cast(Tensor, x), self.weight, self.bias)


class LinearSwiglu(nn.Module):
    """SiLU(x Wg^T) * (x Wu^T). weight: (2 * out, in), the rows of the gate first."""

    weight: nn.Parameter | QuantizedWeight

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * out_features, in_features))

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.linear_swiglu(x)
        return linear_swiglu(cast(Tensor, x), self.weight)


LinearLayer = Linear | LinearGelu | LinearSwiglu


def replace_weight(layer: LinearLayer, weight: nn.Parameter | QuantizedWeight) -> None:
    """Give a layer another weight; a name holds a parameter or a module, and changes kind only when free."""
    del layer.weight
    layer.weight = weight
