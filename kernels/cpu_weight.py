"""y = x W^T + b with W of 8 or 4 bits, for CPUs: the C++ extension, or dequantise-then-matmul without it.

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
from .packed_weight import PackedWeight
from .quantize import QuantizedRows, quantize_rows_reference

PANEL = 16  # outputs whose weights stand together in a packed weight


class CpuWeight(PackedWeight):
    """Weights of 8 or 4 bits, laid out for the extension where there is one.

    codes: (out, in) uint8, below 2**bits; scales: (out, groups); zeros: (out, groups), integers of 0..255, or None for
    2**(bits - 1). groups divides in; with more than one the group size is a multiple of 8. Without the extension they
    may be on any device.

    The extension's layout: panels of 16 outputs, the last filled up; scales float32 and zeros uint8
    (panels, groups, 16); codes (panels, steps, 16, 4) bytes. 8 bits: input 4 * step + i of a panel's output n in byte
    [n, i]. 4 bits: input 8 * step + i in its low half, 8 * step + 4 + i in its high half. The last step is filled up.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> None:
        self.bits = bits
        self.out_features, self.in_features = codes.shape
        self._codes, self._scales, self._zeros = codes, scales.float(), zeros
        self._kernel = None
        if extension is not None and codes.is_cpu:
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
                group=self.in_features // scales.shape[1],
            )

    def linear(
        self,
        x: Tensor | QuantizedRows,
        bias: Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
        isa: str = "",
    ) -> Tensor:
        """As `PackedWeight.linear`. A token with a value that is not finite becomes NaN. isa: see `cpu_extension`."""
        self.check(x, bias)
        out_dtype = out_dtype or x.dtype
        if isinstance(x, QuantizedRows):
            if x.scales is None:  # rounded once more, to their largest code, they would not be what they are
                y = F.linear(x.codes.float(), self.dequantize(), None if bias is None else bias.float())
                return y.to(out_dtype)
            x = x.dequantize()
        if self._kernel is None:
            return linear_reference(x, self._codes, self._scales, self._zeros, self.bits, bias).to(out_dtype)
        dtype = x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=dtype)
        self._kernel.multiply(
            _rows(x.detach().to(dtype)),
            None if bias is None else bias.detach().float().contiguous().numpy(),
            _rows(y),
            threads=torch.get_num_threads(),
            isa=isa,
        )
        return y if y.dtype == out_dtype else y.to(out_dtype)

    def dequantize(self) -> Tensor:
        codes, scales, zeros = self._codes, self._scales, self._zeros
        if self._kernel is not None:
            codes = _unpack_codes(codes, self.bits)[: self.out_features, : self.in_features]
            scales = _unpack_panels(scales)[: self.out_features]
            zeros = None if zeros is None else _unpack_panels(zeros)[: self.out_features]
        return dequantize(codes, scales, zeros, self.bits)


class CpuFp8Weight(PackedWeight):
    """e4m3 weights, one scale an output: what Hopper computes, emulated. codes: (out, in); scales: (out,)."""

    bits = 8
    rows_dtype = torch.float8_e4m3fn

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.out_features, self.in_features = codes.shape
        self._codes, self._scales = codes, scales.float()

    def linear(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        self.check(x, bias)
        rows = x if isinstance(x, QuantizedRows) else quantize_rows_reference(x, torch.float8_e4m3fn)
        y = F.linear(rows.dequantize(), self.dequantize(), None if bias is None else bias.float())
        return y.to(out_dtype or x.dtype)

    def dequantize(self) -> Tensor:
        return self._codes.float() * self._scales[:, None]


def linear_reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, bias: Tensor | None
) -> Tensor:
    """What a `CpuWeight` of these tensors computes."""
    weight = dequantize(codes, scales, zeros, bits)
    return F.linear(round_activations(x, scales.shape[1]), weight, None if bias is None else bias.float()).to(x.dtype)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """scales * (codes - zeros), fp32. Tensors as `CpuWeight` takes them."""
    out_features, groups = scales.shape
    centre = 2.0 ** (bits - 1) if zeros is None else zeros.float()[..., None]
    centred = codes.reshape(out_features, groups, -1) - centre
    return (centred * scales.float()[..., None]).view(out_features, -1)


def round_activations(x: Tensor, groups: int) -> Tensor:
    """x as the quantised matmuls see it: float32, a multiple of a group's largest magnitude / 127. x: (..., in)."""
    return quantize_rows_reference(x.unflatten(-1, (groups, -1))).dequantize().flatten(-2)


def _pack_panels(values: Tensor) -> Tensor:
    """(out, groups) -> (panels, groups, 16)."""
    padded = F.pad(values, (0, 0, 0, -len(values) % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _unpack_panels(panels: Tensor) -> Tensor:
    """(panels, groups, 16) -> (16 * panels, groups)."""
    return panels.transpose(1, 2).flatten(0, 1)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(out, in) -> (panels, steps, 16, 4)."""
    out_features, in_features = codes.shape
    halves = 8 // bits
    padded = F.pad(codes, (0, -in_features % (4 * halves), 0, -out_features % PANEL))
    parts = padded.view(-1, PANEL, padded.shape[1] // (4 * halves), halves, 4)
    joined = parts[:, :, :, 0] if bits == 8 else parts[:, :, :, 0] | parts[:, :, :, 1] << 4
    packed = _huge(joined.transpose(1, 2).shape)
    return packed.copy_(joined.transpose(1, 2))


def _unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """(panels, steps, 16, 4) -> (16 * panels, filled up inputs)."""
    joined = packed.transpose(1, 2)
    parts = joined.unsqueeze(3) if bits == 8 else torch.stack((joined & 15, joined >> 4), dim=3)
    return parts.flatten(2).flatten(0, 1)


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
