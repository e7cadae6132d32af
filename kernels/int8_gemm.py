"""Products of int8 codes on Ampere's tensor cores, in CUDA C++ (csrc/cuda/int8_gemm.cu), scaled in the epilogue.

y = a_m w_n sum_k A_mk W_nk + b_n in fp32; then perhaps GELU; then a 16-bit float, to which a residual may be added, or
int8 on a scale known beforehand for each column.
"""

import ctypes
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cubins
from .cubins import CudaKernel

ROWS, INNER, STAGES = 128, 64, 4  # of a tile, and how many stand in shared memory
ALIGNMENT = 16  # bytes that are copied at a time
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
Columns = Literal[128, 256]  # of a tile


def int8_gemm(
    a: Tensor,
    b: Tensor,
    row_scales: Tensor | None,
    column_scales: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    next_scales: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    columns_of_tile: Columns | None = None,
) -> Tensor:
    """epilogue(a b^T).

    a: (..., inner) int8; b: (columns, inner) int8, contiguous; inner is a multiple of 16. row_scales: (...) fp32, None
    for 1; column_scales: (columns,) fp32; bias: (columns,) in `dtype`, bf16 or fp16. residual: (..., columns) in
    `dtype`, added to the rounded result. next_scales: (columns,) fp32; with it, and GELU, the result is int8 codes
    round(y / next_scales) within -127 .. 127. Returns (..., columns).
    """
    rows, columns, inner = _check(a, b, row_scales, column_scales, bias, residual, next_scales, gelu, dtype)
    to_int8 = next_scales is not None
    if not cubins.available(a.device, kernel_of(dtype, gelu, to_int8, 128).shared):
        return int8_gemm_reference(
            *(a, b, row_scales, column_scales, bias),
            gelu=gelu,
            residual=residual,
            next_scales=next_scales,
            dtype=dtype,
        )
    if columns_of_tile is None:
        columns_of_tile = choose_columns(rows, columns, gelu, cubins.num_sms(a.device))
        if not cubins.available(a.device, kernel_of(dtype, gelu, to_int8, columns_of_tile).shared):
            columns_of_tile = 128
    out = torch.empty(*a.shape[:-1], columns, dtype=torch.int8 if to_int8 else dtype, device=a.device)
    if out.numel() == 0:
        return out
    flat = a.reshape(rows, inner)
    if flat.stride(1) != 1 or flat.stride(0) % ALIGNMENT or flat.data_ptr() % ALIGNMENT:
        flat = flat.clone(memory_format=torch.contiguous_format)
    if residual is not None and residual.data_ptr() % ALIGNMENT:
        residual = residual.clone()
    cubins.launch(
        kernel_of(dtype, gelu, to_int8, columns_of_tile),
        -(-rows // ROWS) * -(-columns // columns_of_tile),
        *(flat, b, row_scales, column_scales, bias, residual, next_scales, out),
        *(rows, columns, inner),
        ctypes.c_int64(flat.stride(0)),
    )
    return out


def kernel_of(dtype: torch.dtype, gelu: bool, to_int8: bool, columns_of_tile: Columns) -> CudaKernel:
    """The kernel with that epilogue and tile. Its shared memory is that of the stages, which the outputs reuse."""
    epilogue = DTYPES[dtype] + ("_gelu" if gelu else "") + ("_int8" if to_int8 else "")
    name = f"int8_gemm_{epilogue}_{ROWS}x{columns_of_tile}"
    return CudaKernel("int8_gemm", name, columns_of_tile, STAGES * (ROWS + columns_of_tile) * INNER)


def kernels() -> list[CudaKernel]:
    """All that int8_gemm.cu has."""
    tiles: tuple[Columns, ...] = (128, 256)
    epilogues = ((False, False), (True, False), (True, True))
    return [kernel_of(dtype, *epilogue, tile) for dtype in DTYPES for epilogue in epilogues for tile in tiles]


@cache
def choose_columns(rows: int, columns: int, gelu: bool, sms: int) -> Columns:
    """The width of tiles: an SM runs one of 256 columns or two of 128 at a time, in the same time.

    So the fewer rounds win. In a tie the wide one reads less, but of two narrow ones one can multiply while the other
    is in its epilogue, which GELU makes long.
    """

    def rounds(width: int, ctas_per_sm: int) -> int:
        return -(-(-(-rows // ROWS) * -(-columns // width)) // (sms * ctas_per_sm))

    wide, narrow = rounds(256, 1), rounds(128, 2)
    return 256 if wide < narrow or (wide == narrow and not gelu) else 128


def int8_gemm_reference(
    a: Tensor,
    b: Tensor,
    row_scales: Tensor | None,
    column_scales: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    next_scales: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    # Sums of int8 products are whole numbers, which doubles hold exactly.
    y = (a.double() @ b.double().mT).float() * column_scales
    if row_scales is not None:
        y = y * row_scales.unsqueeze(-1)
    if bias is not None:
        y = y + bias
    if gelu:
        y = F.gelu(y)
    if next_scales is not None:
        return (y / next_scales).round().clamp(-127, 127).to(torch.int8)
    return y.to(dtype) if residual is None else (y.to(dtype) + residual)


def _check(
    a: Tensor,
    b: Tensor,
    row_scales: Tensor | None,
    column_scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    next_scales: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> tuple[int, int, int]:
    """Rows, columns and inner size; `ValueError` where something does not fit."""
    inner, columns = a.shape[-1], b.shape[0]
    if a.dtype != torch.int8 or b.dtype != torch.int8 or b.shape != (columns, inner):
        raise ValueError(
            f"int8_gemm: a {a.dtype} {tuple(a.shape)}, b {b.dtype} {tuple(b.shape)} are not int8 of one inner size"
        )
    if not b.is_contiguous() or b.data_ptr() % ALIGNMENT:
        raise ValueError(f"int8_gemm: b must be contiguous from a multiple of {ALIGNMENT} bytes")
    if inner == 0 or inner % ALIGNMENT:
        raise ValueError(f"int8_gemm: inner size {inner} must be a multiple of {ALIGNMENT}")
    if dtype not in DTYPES or (residual is not None and (residual.dtype != dtype or gelu)):
        raise ValueError(f"int8_gemm: {dtype} is no 16-bit float, or the residual is of another type or GELU's")
    if next_scales is not None and not gelu:
        raise ValueError("int8_gemm: next_scales are for the codes of GELU")
    wanted = {
        "row_scales": (row_scales, a.shape[:-1], torch.float32),
        "column_scales": (column_scales, (columns,), torch.float32),
        "bias": (bias, (columns,), dtype),
        "residual": (residual, (*a.shape[:-1], columns), dtype),
        "next_scales": (next_scales, (columns,), torch.float32),
    }
    for name, (tensor, shape, kind) in wanted.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != kind or not tensor.is_contiguous()):
            raise ValueError(
                f"int8_gemm: {name} must be {kind} {tuple(shape)}, contiguous; got {tensor.dtype} {tuple(tensor.shape)}"
            )
    return a.numel() // inner, columns, inner
