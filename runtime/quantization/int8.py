"""int8, one scale per output: W8A8, activations rounded per token, and weight-only."""

from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.packed_weight import PackedWeight
from ...kernels.quantized_linear import pack_int8
from .weight import QuantizedWeight


class Int8Weight(QuantizedWeight):
    """scales * codes. codes: (out, in) int8 of -127..127; scales: (out,) fp32. Multiplied by activations in int8."""

    method = "int8"
    weight_only: ClassVar[bool] = False

    def _value(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return codes.float() * scales[:, None]

    def _pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> PackedWeight:
        return pack_int8(codes, scales, weight_only=self.weight_only)


class Int8OnlyWeight(Int8Weight):
    """The same, activations left as they are where the device has a kernel for it."""

    method = "int8-weight"
    weight_only = True


def round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales nearest to a weight (out, in), its largest magnitude per output at 127."""
    scales = weight.abs().amax(1) / 127
    scales = scales.where(scales > 0, 1.0)  # a row of zeros is exact with any scale
    return (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales
