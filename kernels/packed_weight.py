"""What a linear layer asks of its quantised weight, on any device."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import QuantizedRows, quantize_columns_reference
from .swiglu import swiglu


class PackedWeight(ABC):
    """The quantised weight of a linear layer, laid out for the device it is on.

    `rows_dtype`: the codes that its matrix product takes, so that the norm before it may quantise; None where it
    rounds nothing, or rounds as it reads. Everywhere `x` may be rows of these codes instead of numbers.
    """

    bits: int
    in_features: int
    out_features: int
    rows_dtype: torch.dtype | None = None

    @property
    def takes_rows(self) -> bool:
        """Whether `QuantizedRows` of `rows_dtype` are what it computes with."""
        return self.rows_dtype is not None

    @abstractmethod
    def linear(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """x W^T + b. x: (..., in) of any float type, or rows; bias: (out,). Returns (..., out), by default x's type."""

    def linear_gelu(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, next_scales: Tensor | None = None
    ) -> Tensor | QuantizedRows:
        """GELU(x W^T + b), erf form, as `linear`.

        next_scales: (out,) fp32, the scales of the result's columns for a weight that has taken them up. Then the
        result is GELU / next_scales in codes, e4m3 of weights of such and else int8, cut off at the largest code, and
        rows have no scales.
        """
        y = F.gelu(self.linear(x, bias))
        return y if next_scales is None else quantize_columns_reference(y, next_scales, self.rows_dtype or torch.int8)

    def linear_swiglu(self, x: Tensor | QuantizedRows) -> Tensor:
        """SiLU(x Wg^T) * (x Wu^T), the rows of Wg first. Returns (..., out / 2)."""
        return swiglu(self.linear(x))

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight that it stands for: (out, in) fp32."""

    def check(self, x: Tensor | QuantizedRows, bias: Tensor | None) -> None:
        """Raise `ValueError` unless x and bias fit."""
        if x.shape[-1] != self.in_features or (bias is not None and bias.shape != (self.out_features,)):
            raise ValueError(
                f"linear of {self.bits} bits: x has {x.shape[-1]} channels, the weight is "
                f"{(self.out_features, self.in_features)}, bias {None if bias is None else tuple(bias.shape)}"
            )
        if isinstance(x, QuantizedRows) and self.takes_rows and x.codes.dtype != self.rows_dtype:
            raise ValueError(f"linear of {self.bits} bits: rows of {x.codes.dtype}, the weight takes {self.rows_dtype}")
