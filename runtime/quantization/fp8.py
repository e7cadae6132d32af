"""fp8 (e4m3), one scale per output and one per token."""

import torch
from torch import Tensor

from ...kernels.packed_weight import PackedWeight
from ...kernels.quantized_linear import pack_fp8
from .weight import QuantizedWeight

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8Weight(QuantizedWeight):
    """scales * codes. codes: (out, in) float8_e4m3fn; scales: (out,) fp32."""

    method = "fp8"

    def _value(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return codes.float() * scales[:, None]

    def _pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> PackedWeight:
        return pack_fp8(codes, scales)


def round_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales nearest to a weight (out, in), its largest magnitude per output at 448."""
    scales = weight.abs().amax(1) / LARGEST
    scales = scales.where(scales > 0, 1.0)
    return (weight / scales[:, None]).to(torch.float8_e4m3fn), scales
