"""Quantised weights on a GPU: products of 8-bit codes, or of 16-bit activations with weights of 4 or 8 bits."""

import math

import torch
from torch import Tensor

from . import cubins
from .dequantize import dequantize, few_rows_linear
from .dispatch import Target, target_of
from .int4_decode import MAX_ROWS, STEP, DecodeWeight, choose_variant, int4_decode
from .int8_gemm import ALIGNMENT, int8_gemm
from .linear import linear, linear_gelu
from .packed_weight import PackedWeight
from .quantize import QuantizedRows, quantize_columns_reference, quantize_rows
from .scaled_gemm import Epilogue, scaled_linear
from .swiglu import linear_swiglu, swiglu

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
CUDA_ROWS = 64  # above, tiles of 128 rows are more than half full


class ScaledWeight(PackedWeight):
    """int8 or e4m3 weights, one scale an output, multiplied by rows of the same codes on the tensor cores.

    By Triton, and int8 on Ampere in CUDA C++ where that was built: Triton's int8 reaches 40 % of an A100's peak,
    CUTLASS 80 % (published).

    codes: (out, in) int8 or float8_e4m3fn, contiguous; scales: (out,) fp32.
    """

    bits = 8

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.out_features, self.in_features = codes.shape
        self.rows_dtype = codes.dtype
        self.codes, self.scales = codes.contiguous(), scales.float().contiguous()

    def linear(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return self._multiply("none", x, bias, None, out_dtype or x.dtype)

    def linear_gelu(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, next_scales: Tensor | None = None
    ) -> Tensor | QuantizedRows:
        y = self._multiply("gelu", x, bias, next_scales, x.dtype)
        return y if next_scales is None else QuantizedRows(y, None, x.dtype)

    def linear_swiglu(self, x: Tensor | QuantizedRows) -> Tensor:
        return self._multiply("swiglu", x, None, None, x.dtype)

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scales[:, None]

    def _multiply(
        self,
        epilogue: Epilogue,
        x: Tensor | QuantizedRows,
        bias: Tensor | None,
        next_scales: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        self.check(x, bias)
        target = _target(x.codes if isinstance(x, QuantizedRows) else x, self.codes)
        rows = x if isinstance(x, QuantizedRows) else quantize_rows(x, self.codes.dtype)
        if self._is_for_cuda(target, rows, out_dtype):
            y = int8_gemm(
                *(rows.codes, self.codes, rows.scales, self.scales),
                None if bias is None else bias.to(out_dtype),
                gelu=epilogue == "gelu",
                next_scales=next_scales,
                dtype=out_dtype,
            )
            return swiglu(y) if epilogue == "swiglu" else y
        return scaled_linear(
            *(target, rows, self.codes, self.scales, bias),
            epilogue=epilogue,
            next_scales=next_scales,
            out_dtype=out_dtype,
        )

    def _is_for_cuda(self, target: Target, rows: QuantizedRows, out_dtype: torch.dtype) -> bool:
        return (
            target.arch == "sm_80"
            and self.codes.dtype == torch.int8
            and self.in_features % ALIGNMENT == 0
            and out_dtype in SIXTEEN_BITS
            and math.prod(rows.shape[:-1]) > CUDA_ROWS
            and cubins.available(self.codes.device)
        )


class WeightOnly(PackedWeight):
    """Weights of 4 or 8 bits, activations of 16: read as codes by few rows, written out as numbers for many.

    codes, scales, zeros: as `DecodeWeight` takes them.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        self._weight = DecodeWeight(codes, scales, zeros)
        self.bits = self._weight.bits
        self.out_features, self.in_features = codes.shape

    def linear(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        x, bias = self._checked(x, bias)
        if not self._are_few(x):
            y = linear(x, self._matrix(x.dtype), bias)
        elif self._are_for_cuda(x, gated=False):
            y = int4_decode(x, self._weight, bias)
        else:
            y = few_rows_linear(x, self._weight, bias)
        return y if out_dtype is None else y.to(out_dtype)

    def linear_gelu(
        self, x: Tensor | QuantizedRows, bias: Tensor | None = None, next_scales: Tensor | None = None
    ) -> Tensor | QuantizedRows:
        x, bias = self._checked(x, bias)
        if bias is None or self._are_few(x):
            return super().linear_gelu(x, bias, next_scales)
        y = linear_gelu(x, self._matrix(x.dtype), bias)
        return y if next_scales is None else quantize_columns_reference(y, next_scales)

    def linear_swiglu(self, x: Tensor | QuantizedRows) -> Tensor:
        x, _ = self._checked(x, None)
        if not self._are_few(x):
            return linear_swiglu(x, self._matrix(x.dtype))
        if self._are_for_cuda(x, gated=True):
            return int4_decode(x, self._weight, gated=True)
        return super().linear_swiglu(x)

    def dequantize(self) -> Tensor:
        return self._weight.dequantize()

    def _checked(self, x: Tensor | QuantizedRows, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both in x's type."""
        self.check(x, bias)
        x = x.dequantize().to(x.dtype) if isinstance(x, QuantizedRows) else x
        return x, None if bias is None else bias.to(x.dtype)

    def _are_few(self, x: Tensor) -> bool:
        return x.dtype in SIXTEEN_BITS and math.prod(x.shape[:-1]) <= MAX_ROWS

    def _are_for_cuda(self, x: Tensor, *, gated: bool) -> bool:
        """Whether a kernel of csrc/cuda was built and takes these few rows."""
        if not cubins.available(x.device):
            return False
        rows = math.prod(x.shape[:-1])
        return choose_variant(self._weight, rows, gated, cubins.num_sms(x.device)) is not None

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """For as long as a product takes."""
        in_cuda = dtype in SIXTEEN_BITS and self._weight.group_size % STEP == 0
        if in_cuda and cubins.available(self._weight.words.device):
            return self._weight.matrix(dtype)
        return dequantize(self._weight, dtype)


def _target(x: Tensor, weight: Tensor) -> Target:
    target = target_of(x, weight)
    if target is None:
        raise ValueError(f"a weight that was packed for a GPU, without gradients, met x on {x.device}")
    return target
