"""Products of 8-bit codes on the tensor cores, scaled in the epilogue: y = a_m w_n sum_k x_mk W_nk + b_n.

int8 (IMMA on Ampere, IGMMA on Hopper: sums are exact) or e4m3 (QGMMA, Hopper alone). A scale for each row of x, none if
the weight has taken it up, and one for each output. Behind it nothing, GELU, GELU rounded to codes with scales known
beforehand, so that the widest tensor of a ViT is written and read as one byte an element, or SwiGLU.

Two kernels, as in gemm.py, whose tile order and halved epilogues these share:

- `persistent`, for Hopper: programs walk over the output tiles, operands and results go by tensor descriptors (TMA).
  Two programs of 128 x 128 an SM, of which one multiplies while the other is in its epilogue, against one of 128 x 256:
  8-bit products take half as long as those of 16 bits, so that an epilogue counts twice.
- `pipelined`, for Ampere, few rows, and sizes that TMA does not take.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .activation import gelu, silu
from .dispatch import Arch, Choice, Target, choose
from .gemm import GROUP_M, halves, is_aligned, tile_config, tile_origin
from .language import cdiv, jit, kernel, tl
from .launch import launch
from .quantize import QuantizedRows, to_codes
from .signature import ALIGNMENT

Epilogue = Literal["none", "gelu", "swiglu"]
PARTS: Mapping[Epilogue, int] = {"none": 1, "gelu": 1, "swiglu": 2}
OPERATIONS: Mapping[tuple[torch.dtype, Epilogue], str] = {
    (dtype, epilogue): name + ("" if epilogue == "none" else f"_{epilogue}")
    for dtype, name in ((torch.int8, "int8_linear"), (torch.float8_e4m3fn, "fp8_linear"))
    for epilogue in PARTS
}

# What the tables choose from. Each compiles without spills on its architecture, with every epilogue.
CONFIGS: Mapping[Arch, tuple[Choice, ...]] = {
    "sm_80": (
        tile_config("pipelined", 128, 128, 128, 8, 3),
        tile_config("pipelined", 128, 128, 64, 8, 4),
        tile_config("pipelined", 64, 128, 128, 4, 3),
        tile_config("pipelined", 64, 64, 128, 4, 4),
        tile_config("pipelined", 32, 64, 256, 4, 4),
        tile_config("pipelined", 16, 64, 256, 4, 4),
    ),
    "sm_90": (
        tile_config("persistent", 128, 256, 128, 8, 4, programs_per_sm=1),
        tile_config("persistent", 128, 256, 128, 8, 3, programs_per_sm=1),
        tile_config("persistent", 128, 128, 128, 4, 3, programs_per_sm=2),
        tile_config("persistent", 128, 128, 128, 8, 4, programs_per_sm=1),
        tile_config("persistent", 64, 256, 128, 4, 4, programs_per_sm=1),
        tile_config("pipelined", 64, 128, 128, 4, 4),
        tile_config("pipelined", 64, 64, 128, 4, 4),
        tile_config("pipelined", 32, 64, 256, 4, 4),
        tile_config("pipelined", 16, 64, 256, 4, 4),
    ),
}


@jit
def _row_scales(x_scales_ptr, rows, m):
    """Scales of the rows of a tile, as a column."""
    return tl.load(x_scales_ptr + rows, mask=rows < m, other=0.0)[:, None]


@jit
def _scaled(acc, x_scales, scales_ptr, bias_ptr, columns, inside):
    """The numbers that a half of an output tile stands for."""
    y = acc.to(tl.float32)
    if x_scales is not None:
        y *= x_scales
    y *= tl.load(scales_ptr + columns, mask=inside, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@jit
def _finished(
    acc, x_scales, scales_ptr, bias_ptr, next_scales_ptr, columns, n, EPILOGUE: tl.constexpr, dtype: tl.constexpr
):
    """Half an output tile as it is stored: activated, and rounded to codes where scales for them are given."""
    inside = columns < n
    y = _scaled(acc, x_scales, scales_ptr, bias_ptr, columns, inside)
    if EPILOGUE == "gelu":
        y = gelu(y)
    if next_scales_ptr is not None:
        y *= (1.0 / tl.load(next_scales_ptr + columns, mask=inside, other=1.0))[None, :]
        largest: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
        return to_codes(tl.minimum(tl.maximum(y, -largest), largest), dtype)
    else:
        return y.to(dtype)


@kernel(unspecialized=("m",))
def _scaled_persistent_kernel(
    x_ptr, weight_ptr,  # (m, k), (PARTS * n, k) codes
    x_scales_ptr, scales_ptr, bias_ptr, next_scales_ptr,  # (m,) or None, (PARTS * n,), (n,) or None twice
    out_ptr,  # (m, n)
    m, n, k,
    x_stride, weight_stride,
    EPILOGUE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = BLOCK_N // PARTS  # of an output tile
    half: tl.constexpr = BLOCK_N // 2
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    sums: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    part_stride = n.to(tl.int64) * weight_stride
    x_tiles = tl.make_tensor_descriptor(x_ptr, [m, k], [x_stride, 1], [BLOCK_M, BLOCK_K])
    weight_tiles = tl.make_tensor_descriptor(
        weight_ptr, [PARTS, n, k], [part_stride, weight_stride, 1], [PARTS, width, BLOCK_K]
    )
    out_tiles = tl.make_tensor_descriptor(out_ptr, [m, n], [n, 1], [BLOCK_M, half])
    steps = tl.cdiv(k, BLOCK_K)
    tl.assume(steps > 0)  # spares a second epilogue, for the empty sum

    programs = tl.num_programs(0)
    # `tile` runs ahead with the loads. The epilogue counts for itself, or every step would carry its tile along.
    finished = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, BLOCK_M) * tl.cdiv(n, width), programs, flatten=True):
        row, column = tile_origin(tile, m, n, BLOCK_M, width, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), sums)
        for step in range(steps):
            a = x_tiles.load([row, step * BLOCK_K])
            b = weight_tiles.load([0, column, step * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc, out_dtype=sums)

        finished += programs
        row, column = tile_origin(finished, m, n, BLOCK_M, width, GROUP_M)
        x_scales = None
        if x_scales_ptr is not None:
            x_scales = _row_scales(x_scales_ptr, row + tl.arange(0, BLOCK_M), m)
        left, right = halves(acc)
        columns = column + tl.arange(0, half)
        if EPILOGUE == "swiglu":
            gate = _scaled(left, x_scales, scales_ptr, None, columns, columns < n)
            up = _scaled(right, x_scales, scales_ptr + n, None, columns, columns < n)
            out_tiles.store([row, column], (silu(gate) * up).to(dtype))
        else:
            left = _finished(left, x_scales, scales_ptr, bias_ptr, next_scales_ptr, columns, n, EPILOGUE, dtype)
            out_tiles.store([row, column], left)
            columns += half
            right = _finished(right, x_scales, scales_ptr, bias_ptr, next_scales_ptr, columns, n, EPILOGUE, dtype)
            out_tiles.store([row, column + half], right)


@kernel(unspecialized=("m",))
def _scaled_pipelined_kernel(
    x_ptr, weight_ptr,  # (m, k), (PARTS * n, k) codes
    x_scales_ptr, scales_ptr, bias_ptr, next_scales_ptr,  # (m,) or None, (PARTS * n,), (n,) or None twice
    out_ptr,  # (m, n)
    m, n, k,
    x_stride, weight_stride,
    EPILOGUE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WHOLE_K: tl.constexpr,  # BLOCK_K divides k
):  # fmt: skip
    width: tl.constexpr = BLOCK_N // PARTS  # of an output tile
    half: tl.constexpr = BLOCK_N // 2
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    sums: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    row, column = tile_origin(tl.program_id(0), m, n, BLOCK_M, width, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    places = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Past the edge the last row or column is computed again and not stored: that costs the loop no mask.
    x_rows = tl.minimum(rows, m - 1).to(tl.int64)
    weight_rows = (places // width * n + tl.minimum(column + places % width, n - 1)).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * x_stride + inner[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * weight_stride + inner[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), sums)
    for step in range(tl.cdiv(k, BLOCK_K)):
        if WHOLE_K:
            a, b = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            inside = inner < k - step * BLOCK_K
            a = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=sums)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    x_scales = None
    if x_scales_ptr is not None:
        x_scales = _row_scales(x_scales_ptr, rows, m)
    left, right = halves(acc)
    columns = column + tl.arange(0, half)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    if EPILOGUE == "swiglu":
        gate = _scaled(left, x_scales, scales_ptr, None, columns, columns < n)
        up = _scaled(right, x_scales, scales_ptr + n, None, columns, columns < n)
        tl.store(out_ptrs, (silu(gate) * up).to(dtype), mask=inside)
    else:
        left = _finished(left, x_scales, scales_ptr, bias_ptr, next_scales_ptr, columns, n, EPILOGUE, dtype)
        tl.store(out_ptrs, left, mask=inside)
        columns += half
        right = _finished(right, x_scales, scales_ptr, bias_ptr, next_scales_ptr, columns, n, EPILOGUE, dtype)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        tl.store(out_ptrs + half, right, mask=inside)


def scaled_linear(
    target: Target,
    x: QuantizedRows,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    epilogue: Epilogue = "none",
    next_scales: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The epilogue's function of x W^T + b.

    x: (..., k) codes; weight: (n, k), for "swiglu" (2 * n, k), of the same type, rows contiguous; scales: fp32, one a
    row of the weight; bias: (n,). Returns (..., n) of `out_dtype`, by default the type that x had; int8 codes with
    next_scales: (n,) fp32, see `PackedWeight.linear_gelu`.
    """
    m, n, k = math.prod(x.shape[:-1]), weight.shape[0] // PARTS[epilogue], x.shape[-1]
    dtype = weight.dtype if next_scales is not None else out_dtype or x.dtype
    out = torch.empty((*x.shape[:-1], n), dtype=dtype, device=weight.device)
    if m == 0:
        return out
    rows = x.codes.reshape(m, k)
    choice = choose(OPERATIONS[weight.dtype, epilogue], target, m=m, n=n, k=k)
    if choice["implementation"] == "persistent" and (n % ALIGNMENT or not (is_aligned(rows) and is_aligned(weight))):
        choice = FOR_ANY_SIZE
    blocks = {name: choice[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    tiles = cdiv(m, blocks["BLOCK_M"]) * cdiv(n, blocks["BLOCK_N"] // PARTS[epilogue])
    if choice["implementation"] == "persistent":
        implementation, programs = _scaled_persistent_kernel, min(tiles, target.num_sms * choice["programs_per_sm"])
    else:
        implementation, programs = _scaled_pipelined_kernel, tiles
        blocks["WHOLE_K"] = k % blocks["BLOCK_K"] == 0
    launch(
        implementation,
        (programs,),
        *(rows, weight, x.scales, scales, bias, next_scales),
        out,
        *(m, n, k),
        *(rows.stride(0), weight.stride(0)),
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
        EPILOGUE=epilogue,
        PARTS=PARTS[epilogue],
        GROUP_M=GROUP_M,
        **blocks,
    )
    return out


FOR_ANY_SIZE: Choice = tile_config("pipelined", 64, 64, 128, 4, 4)  # what TMA does not take
