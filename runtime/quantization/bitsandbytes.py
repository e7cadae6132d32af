"""nf4 and bnb-int8: weights that the library bitsandbytes multiplies by."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...kernels.packed_weight import PackedWeight
from ...kernels.quantize import QuantizedRows
from ..errors import UnsupportedError
from .int8 import Int8Weight
from .weight import QuantizedWeight

BLOCK = 64  # inputs of an nf4 weight that share a scale
OUTLIER = 6.0  # of LLM.int8(): channels of the input that reach it are multiplied in floating point

# The sixteen quantiles of a normal distribution, scaled to -1..1, that nf4 rounds to.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def library() -> Any:
    """The module bitsandbytes. Raises `UnsupportedError` where it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UnsupportedError("nf4 and bnb-int8 need bitsandbytes: pip install vitrail[quant]")
    return import_module("bitsandbytes")


class Nf4Weight(QuantizedWeight):
    """scales * NF4[q]. codes: (out, in / 2) uint8, the even input in the *high* half; scales: (out, in / 64) fp32."""

    method = "nf4"
    codes_per_byte = 2

    def _value(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return nf4_value(codes, scales)

    def _pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> PackedWeight:
        return _PackedNf4(codes, scales)


class BnbInt8Weight(Int8Weight):
    """int8 weights as `Int8Weight` has them, multiplied by LLM.int8(): outliers of the input stay floating point."""

    method = "bnb-int8"
    capturable = False  # how many channels are outliers is known when the input is

    def _pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> PackedWeight:
        return _PackedInt8(codes, scales)


class _PackedNf4(PackedWeight):
    bits = 4

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.out_features, self.in_features = codes.shape[0], 2 * codes.shape[1]
        self._codes, self._scales = codes, scales
        self._library = library()
        self._states: dict[torch.dtype, Any] = {}

    def linear(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        self.check(x, bias)
        values = numbers(x)
        y = self._library.matmul_4bit(values, self._codes.view(-1, 1).t(), self._state(values.dtype), bias=bias)
        return y.to(out_dtype or x.dtype)

    def dequantize(self) -> Tensor:
        return nf4_value(self._codes, self._scales)

    def _state(self, dtype: torch.dtype) -> Any:
        if dtype not in self._states:
            self._states[dtype] = self._library.functional.QuantState(
                absmax=self._scales.flatten(),
                shape=torch.Size((self.out_features, self.in_features)),
                code=torch.tensor(NF4, device=self._codes.device),
                blocksize=BLOCK,
                quant_type="nf4",
                dtype=dtype,
            )
        return self._states[dtype]


class _PackedInt8(PackedWeight):
    bits = 8

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.out_features, self.in_features = codes.shape
        self._codes, self._scales = codes, scales
        self._library = library()

    def linear(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        self.check(x, bias)
        rows = numbers(x).flatten(0, -2)
        # The library's own `matmul` does these two steps and logs a warning at every call that is not in float16.
        codes, largest, outliers = self._library.functional.int8_vectorwise_quant(rows.half(), threshold=OUTLIER)
        y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            rows, codes, self._codes, largest, self._scales * 127, outliers, bias
        )
        y = y.unflatten(0, x.shape[:-1])
        return y.to(out_dtype or x.dtype)

    def dequantize(self) -> Tensor:
        return self._codes.float() * self._scales[:, None]


def numbers(x: Tensor | QuantizedRows) -> Tensor:
    return x.dequantize().to(x.dtype) if isinstance(x, QuantizedRows) else x


def round_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales nearest to a weight (out, in), whose inputs 64 divides."""
    blocks = weight.unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(2)
    levels = torch.tensor(NF4, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    normal = blocks / scales.where(scales > 0, 1.0)[..., None]
    q = torch.bucketize(normal.flatten(1).contiguous(), between).to(torch.uint8)
    return q[:, 0::2] << 4 | q[:, 1::2], scales


def nf4_value(codes: Tensor, scales: Tensor) -> Tensor:
    """(out, in) fp32 of codes and scales as `Nf4Weight` has them."""
    q = torch.stack((codes >> 4, codes & 15), dim=2).flatten(1)
    levels = torch.tensor(NF4, device=codes.device)[q.int()]
    return (levels.unflatten(1, (-1, BLOCK)) * scales[..., None]).flatten(1)
