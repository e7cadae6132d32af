"""y = x W^T + b with W of 8 or 4 bits, for CPUs: the C++ extension, or dequantise-then-matmul without it.

A weight is scales * (q - zeros). int8: q is signed, one scale per output, no zeros. int4: q is 0..15, one scale per
output and group of inputs, zeros likewise or 8 everywhere.

Activations are rounded to int8 on the way, symmetrically to their largest magnitude / 127: per token for int8 (W8A8;
weight-only int8 is the same operation here), per token *and group* for int4. Products are then integers and their sums
exact. For int4 that is both the fast and an accurate way: an integer dot product takes four times as many weights as
a float one, which prefill needs, and the error that it adds, 0.6 % of y for normal activations, is a fifteenth of that
of the 4-bit weights; a channel that sticks out costs only its own group precision. Decode and prefill agree to the last
bit, whatever the number of rows, of threads, and the instruction set: see csrc/cpu/quantized_matmul.h.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_extension import extension

PANEL = 16  # outputs whose weights stand together in a packed weight
TINY = 1e-30  # activations whose magnitudes are all below become zero


class PackedWeight:
    """The quantised weight of a linear layer, laid out for the extension where there is one.

    codes: (out, in) uint8, below 2**bits; scales: (out, groups); zeros: (out, groups), integers of 0..255, or None for
    2**(bits - 1); all on the CPU. groups divides in; with more than one the group size is a multiple of 8.

    The extension's layout: panels of 16 outputs, the last filled up; scales float32 and zeros uint8
    (panels, groups, 16); codes (panels, steps, 16, 4) bytes. 8 bits: input 4 * step + i of a panel's output n in byte
    [n, i]. 4 bits: input 8 * step + i in its low half, 8 * step + 4 + i in its high half. The last step is filled up.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> None:
        self.bits = bits
        self.out_features, self.in_features = codes.shape
        groups = scales.shape[-1]
        self.group_size = self.in_features // groups if groups else 0
        _check(codes, scales, zeros, bits, self.group_size)
        self._codes, self._scales, self._zeros = codes, scales.float(), zeros
        self._kernel = None
        if extension is not None:
            self._codes = _pack_codes(codes, bits)
            self._scales = _pack_panels(self._scales)
            self._zeros = None if zeros is None else _pack_panels(zeros.to(torch.uint8))
            self._kernel = extension.Weight(
                self._codes.numpy(),
                self._scales.numpy(),
                None if self._zeros is None else self._zeros.numpy(),
                bits=bits,
                outputs=self.out_features,
                inputs=self.in_features,
                group=self.group_size,
            )

    def linear(self, x: Tensor, bias: Tensor | None, isa: str = "") -> Tensor:
        if x.shape[-1] != self.in_features or (bias is not None and bias.shape != (self.out_features,)):
            raise ValueError(
                f"int{self.bits}_linear: x has {x.shape[-1]} channels, the weight is "
                f"{(self.out_features, self.in_features)}, bias {None if bias is None else tuple(bias.shape)}"
            )
        if self._kernel is None:
            return _linear_reference(x, self._codes, self._scales, self._zeros, self.bits, bias)
        dtype = x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=dtype)
        self._kernel.multiply(
            _rows(x.detach().to(dtype)),
            None if bias is None else bias.detach().float().contiguous().numpy(),
            _rows(y),
            threads=torch.get_num_threads(),
            isa=isa,
        )
        return y if y.dtype == x.dtype else y.to(x.dtype)


def pack_int8(weight: Tensor, scales: Tensor) -> PackedWeight:
    """weight: (out, in) int8; scales: (out,) float."""
    if weight.dtype != torch.int8:
        raise ValueError(f"pack_int8: the weight must be int8, got {weight.dtype}")
    return PackedWeight(_offset(weight), scales.unsqueeze(-1), None, bits=8)


def pack_int4(weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> PackedWeight:
    """weight: (out, in) uint8 of 0..15; scales: (out, groups) float; zeros: (out, groups) integers, or None for 8."""
    return PackedWeight(weight, scales, zeros, bits=4)


def int8_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: (..., in) of any float type, on the CPU; weight from `pack_int8`; bias: (out,). Returns (..., out), x's type.

    A token with a value that is not finite becomes NaN.
    """
    return weight.linear(x, bias)


def int4_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As `int8_linear`, with a weight from `pack_int4`."""
    return weight.linear(x, bias)


def int8_linear_reference(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight and scales as `pack_int8` takes them."""
    return _linear_reference(x, _offset(weight), scales.unsqueeze(-1), None, 8, bias)


def int4_linear_reference(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """weight, scales and zeros as `pack_int4` takes them."""
    return _linear_reference(x, weight, scales, zeros, 4, bias)


def _linear_reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, bias: Tensor | None
) -> Tensor:
    out_features, groups = scales.shape
    centred = codes.view(out_features, groups, -1) - (2.0 ** (bits - 1) if zeros is None else zeros.float()[..., None])
    weight = (centred * scales.float()[..., None]).view(out_features, -1)
    return F.linear(round_activations(x, groups), weight, None if bias is None else bias.float()).to(x.dtype)


def round_activations(x: Tensor, groups: int) -> Tensor:
    """x as the quantised matmuls see it: float32, a multiple of a group's largest magnitude / 127. x: (..., in)."""
    grouped = x.float().unflatten(-1, (groups, -1))
    largest = grouped.abs().amax(-1, keepdim=True)
    rounded = (grouped * (127 / largest)).round() * (largest / 127)
    return rounded.where(~(largest < TINY), 0).where(largest.isfinite(), torch.nan).flatten(-2)


def _offset(weight: Tensor) -> Tensor:
    """int8 as uint8, 128 higher."""
    return weight.view(torch.uint8) ^ 128


def _check(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> None:
    out_features, in_features = codes.shape
    if codes.dtype != torch.uint8 or int(codes.max()) >> bits:
        raise ValueError(f"codes must be uint8 below {2**bits}, got {codes.dtype} up to {codes.max()}")
    if scales.dim() != 2 or len(scales) != out_features or group_size < 1 or in_features % scales.shape[1]:
        raise ValueError(f"scales {tuple(scales.shape)} do not fit a weight {tuple(codes.shape)}")
    if group_size % 8 and group_size != in_features:
        raise ValueError(f"group size {group_size} must be a multiple of 8 or all of {in_features} inputs")
    if zeros is not None and (zeros.shape != scales.shape or zeros.is_floating_point()):
        raise ValueError(f"zeros must be integers {tuple(scales.shape)}, got {zeros.dtype} {tuple(zeros.shape)}")
    if zeros is not None and not 0 <= zeros.min() <= zeros.max() <= 255:
        raise ValueError(f"zeros must lie in 0..255, they reach from {zeros.min()} to {zeros.max()}")


def _pack_panels(values: Tensor) -> Tensor:
    """(out, groups) -> (panels, groups, 16)."""
    padded = F.pad(values, (0, 0, 0, -len(values) % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(out, in) -> (panels, steps, 16, 4)."""
    out_features, in_features = codes.shape
    halves = 8 // bits
    padded = F.pad(codes, (0, -in_features % (4 * halves), 0, -out_features % PANEL))
    parts = padded.view(-1, PANEL, padded.shape[1] // (4 * halves), halves, 4)
    joined = parts[:, :, :, 0] if bits == 8 else parts[:, :, :, 0] | parts[:, :, :, 1] << 4
    packed = _huge(joined.transpose(1, 2).shape)
    return packed.copy_(joined.transpose(1, 2))


def _huge(shape: torch.Size) -> Tensor:
    """Memory for bytes that are read in order: NumPy asks for huge pages, which torch does not (a fifth more bandwidth
    in decode), and a vector of 64 bytes is loaded fastest from within a cache line.
    """
    memory = np.empty(shape.numel() + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + shape.numel()]).view(shape)


def _rows(x: Tensor) -> npt.NDArray[Any]:
    """(rows, channels) of the same memory, where it is contiguous. NumPy has no bfloat16."""
    x = x.contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy().reshape(-1, x.shape[-1])
