"""Rows of activations as 8-bit codes with a scale each: symmetric, the largest magnitude of a row is the largest code.

int8: codes -127..127. e4m3: up to 448, the largest that it has. A matrix product of codes is exact for int8 and scaled
afterwards. One pass: a program keeps its row in registers between the maximum and the rounding.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import Target, target_of
from .language import jit, kernel, next_power_of_2, row_warps, tl
from .launch import launch

LARGEST: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TINY = 1e-30  # rows whose magnitudes are all below become zero


class QuantizedRows(NamedTuple):
    """Rows x = codes * scales, as the matrix products of quantised weights take them.

    codes: (..., channels) int8 or float8_e4m3fn; scales: (...) fp32, or None where the codes' scales are known
    beforehand and part of the weight. dtype: what the rows were, and what results are to be.
    """

    codes: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the rows, which is that of the codes."""
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """(..., channels) fp32."""
        codes = self.codes.float()
        return codes if self.scales is None else codes * self.scales.unsqueeze(-1)


@jit
def magnitude(x):
    """|x| of fp32 as an integer, of the same order: infinity is behind all numbers and NaN last, lost in no maximum."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def scale_of(largest, dtype: tl.constexpr):
    """The scale of rows, NaN where something is not finite, and by what they are multiplied to become codes.

    largest: their largest `magnitude`.
    """
    largest_code: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    largest = largest.to(tl.float32, bitcast=True)
    scale = tl.where(largest < float("inf"), largest / largest_code, float("nan"))
    return scale, tl.where(largest < 1e-30, 0.0, largest_code / tl.maximum(largest, 1e-30))


@jit
def quantized(x, dtype: tl.constexpr):
    """Codes of a row of fp32, and its scale."""
    scale, factor = scale_of(tl.max(magnitude(x), 0), dtype)
    return to_codes(x * factor, dtype), scale


@jit
def to_codes(x, dtype: tl.constexpr):
    """x rounded to the nearest code. x: fp32, of int8 within -127.5 .. 127.5."""
    if dtype == tl.int8:
        # The last bits of x + 1.5 * 2^23 are the nearest integer, ties to even: one addition, no conversion.
        return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return x.to(dtype)


@kernel()
def _quantize_rows_kernel(
    x_ptr, codes_ptr, scales_ptr,
    channels, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < channels
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)

    codes, scale = quantized(x, codes_ptr.dtype.element_ty)

    tl.store(codes_ptr + row * channels + columns, codes, mask=inside)
    tl.store(scales_ptr + row, scale)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """Codes of `dtype` (int8 or float8_e4m3fn) and a scale for each row. x: (..., channels), rows evenly spaced.

    A row with a value that is not finite gets NaN for its scale.
    """
    target = target_of(x)
    check_codes(dtype, target)
    if target is None:
        return quantize_rows_reference(x, dtype)
    channels = x.shape[-1]
    rows = x.reshape(-1, channels)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    result = empty_rows(x, dtype)
    block = next_power_of_2(channels)
    launch(
        _quantize_rows_kernel,
        (rows.shape[0],),
        *(rows, result.codes, result.scales),
        *(channels, rows.stride(0)),
        num_warps=row_warps(block),
        BLOCK=block,
    )
    return result


def quantize_rows_reference(x: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    x32 = x.float()
    largest = x32.abs().amax(-1, keepdim=True)
    scaled = (x32 * (LARGEST[dtype] / largest)).where((largest >= TINY) & largest.isfinite(), 0)
    codes = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    scales = (largest / LARGEST[dtype]).where(largest.isfinite(), torch.nan)
    return QuantizedRows(codes, scales.squeeze(-1), x.dtype)


def quantize_columns_reference(x: Tensor, scales: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """Codes of (..., channels) for scales (channels,) known beforehand, which a weight has taken up."""
    scaled = (x.float() / scales).clamp(-LARGEST[dtype], LARGEST[dtype])
    return QuantizedRows((scaled.round() if dtype == torch.int8 else scaled).to(dtype), None, x.dtype)


def check_codes(dtype: torch.dtype, target: Target | None) -> None:
    """Raise `ValueError` for a type that is none of codes, or that a GPU does not compute with."""
    if dtype not in LARGEST:
        raise ValueError(f"codes are int8 or float8_e4m3fn, not {dtype}")
    if dtype == torch.float8_e4m3fn and target is not None and target.arch != "sm_90":
        raise ValueError(
            f"float8_e4m3fn needs a GPU of compute capability 9.0; {target.name} is taken as {target.arch}"
        )


def empty_rows(x: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Memory for the codes and scales of x: (..., channels)."""
    options: dict[str, Any] = {"device": x.device}
    codes = torch.empty(x.shape, dtype=dtype, **options)
    return QuantizedRows(codes, torch.empty(x.shape[:-1], dtype=torch.float32, **options), x.dtype)
