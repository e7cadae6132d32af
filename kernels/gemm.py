"""GEMMs that end in an activation: GELU(x W^T + b), or SwiGLU of a projection to gate and up, with no pass of its own.

Two kernels with one tile order and one set of epilogues:

- `persistent`, for Hopper: as many programs as the GPU holds walk over the output tiles. Operands come through tensor
  descriptors (TMA), results leave the same way, and the loads of the next tile run under the epilogue of this one.
- `pipelined`, for Ampere and for small shapes everywhere: one program a tile, pointers, copies ahead of the products.

Tiles are halved for the epilogue. GELU treats one half after the other, so that half a tile at a time is converted and
staged for the store. For SwiGLU the weight tile is cut from both parts of the weight, gate rows and then up rows, so
that the halves of the accumulator are the gate and the up of the same columns.

The table says where neither pays. An epilogue saves 4 bytes of traffic an element (SwiGLU: 6), however long the sum is,
while cuBLAS is the faster multiplier, on Ampere by a seventh: long sums are better left to it and a pointwise kernel.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .activation import gelu, silu
from .dispatch import Arch, Choice, Target, choose
from .language import cdiv, jit, kernel, tl
from .launch import launch
from .signature import ALIGNMENT

Epilogue = Literal["gelu", "swiglu"]
PARTS: Mapping[Epilogue, int] = {"gelu": 1, "swiglu": 2}
GROUP_M = 8  # rows of tiles that are visited together, for their columns' weights to be found in L2


def tile_config(implementation: str, m: int, n: int, k: int, num_warps: int, num_stages: int, **more: int) -> Choice:
    """A kernel with its output tile of m x n, k at a step, and the launch's options, as the tables write it."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return {"implementation": implementation, **blocks, "num_warps": num_warps, "num_stages": num_stages, **more}


# What the tables choose from. Each compiles without spills on its architecture, with either epilogue.
CONFIGS: Mapping[Arch, tuple[Choice, ...]] = {
    "sm_80": (
        {"implementation": "torch"},
        tile_config("pipelined", 128, 256, 64, 8, 4),
        tile_config("pipelined", 128, 128, 32, 4, 4),  # two programs an SM: one multiplies while the other ends
        tile_config(
            "pipelined", 64, 128, 64, 4, 4
        ),  # few tiles, e.g. 1025 rows, which waste 5.8 % of 64 and 11 % of 128
        tile_config("pipelined", 64, 64, 64, 4, 4),
        # Decoding is bound by the weights: 48 KB of them in flight for each program, two or three programs an SM.
        tile_config("pipelined", 32, 64, 128, 4, 4),
        tile_config("pipelined", 16, 64, 128, 4, 4),
    ),
    "sm_90": (
        {"implementation": "torch"},
        tile_config("persistent", 128, 256, 64, 8, 4, programs_per_sm=1),
        tile_config("persistent", 128, 256, 64, 8, 3, programs_per_sm=1),
        tile_config("persistent", 128, 128, 64, 4, 3, programs_per_sm=2),
        tile_config("persistent", 128, 128, 64, 8, 4, programs_per_sm=1),
        tile_config("persistent", 64, 256, 64, 4, 4, programs_per_sm=1),
        tile_config("pipelined", 64, 128, 64, 4, 4),
        tile_config("pipelined", 64, 64, 64, 4, 4),
        tile_config("pipelined", 32, 64, 128, 4, 4),
        tile_config("pipelined", 16, 64, 128, 4, 4),
    ),
}


@jit
def tile_origin(tile, m, n, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of an output tile: down the rows of a group, then on to the next columns."""
    tiles_n = tl.cdiv(n, WIDTH)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tl.cdiv(m, BLOCK_M) - first, GROUP_M)
    place = tile % (GROUP_M * tiles_n)
    return (first + place % rows) * BLOCK_M, place // rows * WIDTH


@jit
def halves(acc):
    """The left and the right half of the columns; no data moves, as every thread holds pieces of both."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@jit
def _biased_gelu(acc, bias_ptr, column, n, HALF: tl.constexpr):
    columns = column + tl.arange(0, HALF)
    bias = tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
    return gelu(acc + bias.to(tl.float32)[None, :])


@kernel(unspecialized=("m",))
def _persistent_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,  # (m, k), (PARTS * n, k), (n,) or None, (m, n)
    m, n, k,
    x_stride, weight_stride,
    EPILOGUE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = BLOCK_N // PARTS  # of an output tile
    half: tl.constexpr = BLOCK_N // 2
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
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            a = x_tiles.load([row, step * BLOCK_K])
            b = weight_tiles.load([0, column, step * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")

        finished += programs
        row, column = tile_origin(finished, m, n, BLOCK_M, width, GROUP_M)
        left, right = halves(acc)
        if EPILOGUE == "swiglu":
            out_tiles.store([row, column], (silu(left) * right).to(out_ptr.dtype.element_ty))
        else:
            left = _biased_gelu(left, bias_ptr, column, n, half)
            out_tiles.store([row, column], left.to(out_ptr.dtype.element_ty))
            right = _biased_gelu(right, bias_ptr, column + half, n, half)
            out_tiles.store([row, column + half], right.to(out_ptr.dtype.element_ty))


@kernel(unspecialized=("m",))
def _pipelined_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,  # (m, k), (PARTS * n, k), (n,) or None, (m, n)
    m, n, k,
    x_stride, weight_stride,
    EPILOGUE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WHOLE_K: tl.constexpr,  # BLOCK_K divides k
):  # fmt: skip
    width: tl.constexpr = BLOCK_N // PARTS  # of an output tile
    half: tl.constexpr = BLOCK_N // 2
    row, column = tile_origin(tl.program_id(0), m, n, BLOCK_M, width, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    places = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Past the edge the last row or column is computed again and not stored: that costs the loop no mask.
    x_rows = tl.minimum(rows, m - 1).to(tl.int64)
    weight_rows = (places // width * n + tl.minimum(column + places % width, n - 1)).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * x_stride + inner[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * weight_stride + inner[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(k, BLOCK_K)):
        if WHOLE_K:
            a, b = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            inside = inner < k - step * BLOCK_K
            a = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    left, right = halves(acc)
    columns = column + tl.arange(0, half)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    if EPILOGUE == "swiglu":
        tl.store(out_ptrs, (silu(left) * right).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        left = _biased_gelu(left, bias_ptr, column, n, half)
        tl.store(out_ptrs, left.to(out_ptr.dtype.element_ty), mask=inside)
        right = _biased_gelu(right, bias_ptr, column + half, n, half)
        inside = (rows < m)[:, None] & (columns + half < n)[None, :]
        tl.store(out_ptrs + half, right.to(out_ptr.dtype.element_ty), mask=inside)


def fused_linear(epilogue: Epilogue, target: Target, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The epilogue's function of x W^T + b by one kernel; None where the library and a pointwise kernel are wanted.

    x: (..., k); weight: (n, k), for "swiglu" (2 * n, k); bias: (n,). The library is wanted where the table says so; in
    fp32, which has no tensor cores; and where a size or a stride does not divide by 16, which wide loads and TMA need.
    """
    m, n, k = math.prod(x.shape[:-1]), weight.shape[0] // PARTS[epilogue], x.shape[-1]
    if m == 0 or x.dtype == torch.float32:
        return None
    rows = x.reshape(m, k)
    if n % ALIGNMENT or not (is_aligned(rows) and is_aligned(weight)):
        return None
    choice = choose(f"linear_{epilogue}", target, m=m, n=n, k=k)
    if choice["implementation"] == "torch":
        return None
    return gemm(epilogue, target, rows, weight, bias, choice).view(*x.shape[:-1], n)


def is_aligned(matrix: Tensor) -> bool:
    """Whether the rows of a matrix are contiguous, apart from each other, and known to the compiler as aligned."""
    (_, columns), (stride, step) = matrix.shape, matrix.stride()
    divides = (value % ALIGNMENT == 0 for value in (matrix.data_ptr(), columns, stride))
    return step == 1 and stride >= columns and all(divides)


def gemm(epilogue: Epilogue, target: Target, x: Tensor, weight: Tensor, bias: Tensor | None, choice: Choice) -> Tensor:
    """`fused_linear` by the kernel and with the constants of `choice`. x: (m, k); rows of x and weight contiguous."""
    (m, k), n = x.shape, weight.shape[0] // PARTS[epilogue]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    blocks = {name: choice[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    tiles = cdiv(m, blocks["BLOCK_M"]) * cdiv(n, blocks["BLOCK_N"] // PARTS[epilogue])
    if choice["implementation"] == "persistent":
        implementation, programs = _persistent_kernel, min(tiles, target.num_sms * choice["programs_per_sm"])
    else:
        implementation, programs = _pipelined_kernel, tiles
        blocks["WHOLE_K"] = k % blocks["BLOCK_K"] == 0
    launch(
        implementation,
        (programs,),
        *(x, weight, bias, out),
        *(m, n, k),
        *(x.stride(0), weight.stride(0)),
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
        EPILOGUE=epilogue,
        PARTS=PARTS[epilogue],
        GROUP_M=GROUP_M,
        **blocks,
    )
    return out
