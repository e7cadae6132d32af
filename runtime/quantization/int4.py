"""int4 weights in groups of inputs, activations in the model's type: W4A16."""

import torch
from torch import Tensor

from ...kernels.packed_weight import PackedWeight
from ...kernels.quantized_linear import pack_int4
from .weight import QuantizedWeight


class Int4Weight(QuantizedWeight):
    """scales * (q - zeros), q of 0..15.

    codes: (out, in / 2) uint8, the even input in the low half; scales: (out, groups) fp32; zeros: (out, groups) uint8,
    or None for 8.
    """

    method = "int4"
    codes_per_byte = 2

    def _value(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        q = unpack_nibbles(codes).float().unflatten(1, (scales.shape[1], -1))
        centred = q - (8.0 if zeros is None else zeros.float()[..., None])
        return (centred * scales[..., None]).flatten(1)

    def _pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> PackedWeight:
        return pack_int4(unpack_nibbles(codes), scales, zeros)


def round_int4(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros nearest to a weight (out, in), whose inputs the group size divides.

    Symmetric: the value of largest magnitude of a group becomes code 0, which is -8 scales; scales may be negative.
    That keeps it exact and all 16 codes in use, at a smaller step than a range from -7 to 7 has.
    """
    groups = weight.unflatten(1, (-1, group_size))  # [out, groups, group_size]
    if symmetric:
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scales = largest / -8
        scales = scales.where(scales != 0, 1.0)
        q = (groups / scales).round() + 8
        zeros = None
    else:
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        scales = (high - low) / 15
        scales = scales.where(scales > 0, 1.0)
        zero = (-low / scales).round()
        q = (groups / scales).round() + zero
        zeros = zero.squeeze(2).to(torch.uint8)
    return pack_nibbles(q.clamp(0, 15).to(torch.uint8).flatten(1)), scales.squeeze(2), zeros


def pack_nibbles(q: Tensor) -> Tensor:
    """(out, in) uint8 below 16 to (out, in / 2), the even column in the low half."""
    return q[:, 0::2] | q[:, 1::2] << 4


def unpack_nibbles(codes: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
