"""Weights of 4 or 8 bits in Triton: written out as numbers for a library's product, or multiplied by a few rows.

With more rows than a decode step has, a product is bound by the tensor cores, and the library's is the fastest: the
matrix is written out at the speed of memory, and multiplied. With few rows it is bound by reading the weight, and what
is read must be the codes. Both are also in CUDA C++ (int4_decode.py), which `gpu_weight` prefers where it was built;
the layout is that one's, see `DecodeWeight`.

In a step of 64 inputs, row g of a tile of 16 outputs is 64 neighbouring bytes. A byte holds the codes of one input for
the outputs g and g + 8; of four inputs, the second and the third change places. With 8 bits two such blocks follow each
other, of the first and second eight inputs of each sixteen, and the codes of g and g + 8 are neighbours.
"""

import torch
from torch import Tensor

from .int4_decode import LEAST_GROUP, MAX_ROWS, STEP, TILE, DecodeWeight
from .language import cdiv, jit, kernel, next_power_of_2, tl
from .launch import launch

BLOCK_STEPS = 4  # of a tile, that a program writes out: 16 bytes of codes for each of its 128 threads
# Of the few rows' product: 64 outputs by 128 inputs at a time, of which 20 KB are under way. Half the SMs' programs of
# a thin matrix, 6144 outputs, are not much more than latency; Marlin's way out, CUDA C++, is not open to Triton.
BLOCK_TILES, INNER_STEPS, NUM_WARPS, NUM_STAGES = 4, 2, 4, 5


@jit
def _codes(words, ROWS: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr):
    """Codes of the outputs g and those of g + 8, both (ROWS, STEPS * 64), inputs in order.

    words: (ROWS, STEPS * 16 * BITS) bytes. No data moves between threads that hold 16 neighbours each.
    """
    if BITS == 4:
        words = words.reshape(ROWS, STEPS * 16, 2, 2).permute(0, 1, 3, 2).reshape(ROWS, STEPS * 64)
        return words & 15, words >> 4
    else:
        low, high = words.reshape(ROWS, STEPS, 2, 4, 8, 2).permute(0, 1, 3, 2, 4, 5).split()
        return low.reshape(ROWS, STEPS * 64), high.reshape(ROWS, STEPS * 64)


@jit
def _centred(codes, zeros, BITS: tl.constexpr, dtype: tl.constexpr):
    """codes - zeros, exactly. An integer below 128 is the mantissa of a bf16 from 128 on; of fp16, of one from 1024."""
    if BITS == 8:
        return (codes ^ 128).to(tl.int8, bitcast=True).to(dtype)
    elif dtype == tl.bfloat16:
        return (codes.to(tl.int16) | 0x4300).to(dtype, bitcast=True) - (zeros + 128).to(dtype)
    elif dtype == tl.float16:
        return (codes.to(tl.int16) | 0x6400).to(dtype, bitcast=True) - (zeros + 1024).to(dtype)
    else:
        return codes.to(dtype) - zeros.to(dtype)


@jit
def _scales_and_zeros(scale_words):
    """The last 8 bits of a scale are the zero; the scale was rounded with it in mind."""
    return scale_words.to(tl.float32, bitcast=True), scale_words & 255


@kernel()
def _dequantize_kernel(
    words_ptr, scale_words_ptr, out_ptr,  # (out_features, steps * 64)
    out_features, steps, groups, units_per_group,
    BITS: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    units: tl.constexpr = 64 // UNIT  # of a step: inputs that share a scale
    tile, first = tl.program_id(0), tl.program_id(1) * STEPS
    loads: tl.constexpr = BITS // 4
    g, block = tl.arange(0, 8), tl.arange(0, STEPS * 64 * loads)
    inside = block < (steps - first) * (64 * loads)
    words_ptr += (tile.to(tl.int64) * steps + first) * (512 * loads)
    offsets = g[:, None] * 64 + (block // 64 * 512 + block % 64)[None, :]
    low, high = _codes(tl.load(words_ptr + offsets, mask=inside[None, :], other=0), 8, STEPS, BITS)

    columns = tl.arange(0, STEPS * 64)
    unit = first * units + tl.arange(0, STEPS * units)
    scale_words_ptr += ((tile * groups + unit // units_per_group)[None, :] * 8 + g[:, None]) * 2
    outputs = tile * TILE + g
    out_ptrs = out_ptr + outputs.to(tl.int64)[:, None] * (steps * 64) + (first * 64 + columns)[None, :]
    there = (columns < (steps - first) * 64)[None, :]
    for half in tl.static_range(2):
        codes = low if half == 0 else high
        scale_words = tl.load(scale_words_ptr + half, mask=(unit < steps * units)[None, :], other=0)
        scales, zeros = _scales_and_zeros(scale_words)
        codes = codes.reshape(8, STEPS * units, UNIT)
        numbers = _centred(codes, zeros[:, :, None], BITS, tl.float32) * scales[:, :, None]
        numbers = numbers.reshape(8, STEPS * 64).to(out_ptr.dtype.element_ty)
        mask = there & (outputs + half * 8 < out_features)[:, None]
        tl.store(out_ptrs + half * 8 * steps * 64, numbers, mask=mask)


@kernel(unspecialized=("m",))
def _few_rows_kernel(
    x_ptr, words_ptr, scale_words_ptr, bias_ptr, out_ptr,  # (m, steps * 64), ..., (out_features,) or None, (m, out)
    m, out_features, steps, groups, units_per_group,
    x_stride,
    BITS: tl.constexpr, TILES: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The weight is the left operand. A block's rows are the outputs g of its tiles and then the outputs g + 8."""
    units: tl.constexpr = 64 // UNIT  # of a step: inputs that share a scale
    loads: tl.constexpr = BITS // 4
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0) * TILES
    last = (out_features + TILE - 1) // TILE - 1
    place, block = tl.arange(0, TILES * 8), tl.arange(0, STEPS * 64 * loads)
    # Past the edge the last tile is multiplied again and not stored.
    tiles = tl.minimum(first + place // 8, last)
    words_ptrs = words_ptr + (tiles.to(tl.int64) * steps * (512 * loads) + place % 8 * 64)[:, None]
    words_ptrs += (block // 64 * 512 + block % 64)[None, :]
    both = tl.arange(0, TILES * 16)
    half, place = both // (TILES * 8), both % (TILES * 8)
    tiles = tl.minimum(first + place // 8, last)
    scale_words_ptrs = scale_words_ptr + (tiles * groups * 8 + place % 8) * 2 + half
    rows, columns = tl.arange(0, ROWS), tl.arange(0, STEPS * 64)
    x_ptrs = x_ptr + tl.minimum(rows, m - 1)[None, :].to(tl.int64) * x_stride + columns[:, None]

    acc = tl.zeros((TILES * 16, ROWS), tl.float32)
    for step in tl.range(0, steps, STEPS):
        words = tl.load(
            words_ptrs + step * (512 * loads), mask=(block < (steps - step) * (64 * loads))[None, :], other=0
        )
        x = tl.load(x_ptrs + step * 64, mask=(columns < (steps - step) * 64)[:, None], other=0.0)
        low, high = _codes(words, TILES * 8, STEPS, BITS)
        codes = tl.join(low, high).permute(2, 0, 1).reshape(TILES * 16, STEPS * 64)
        if UNIT == 64:
            scales, zeros = _scales_and_zeros(tl.load(scale_words_ptrs + step // units_per_group * 16))
            acc += tl.dot(_centred(codes, zeros[:, None], BITS, dtype), x) * scales[:, None]
        else:
            group = (step * units + tl.arange(0, units)) // units_per_group
            scales, zeros = _scales_and_zeros(tl.load(scale_words_ptrs[:, None] + group[None, :] * 16))
            codes = codes.reshape(TILES * 16, units, UNIT)
            numbers = _centred(codes, zeros[:, :, None], BITS, tl.float32) * scales[:, :, None]
            acc += tl.dot(numbers.reshape(TILES * 16, STEPS * 64).to(dtype), x)

    outputs = (first + place // 8) * TILE + half * 8 + place % 8
    inside = outputs < out_features
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows[None, :].to(tl.int64) * out_features + outputs[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (rows < m)[None, :])


def _unit(weight: DecodeWeight) -> int:
    """Inputs that have a scale in common: those of a step, or half of them where groups are of 32."""
    return STEP if weight.group_size % STEP == 0 else LEAST_GROUP


def dequantize(weight: DecodeWeight, dtype: torch.dtype) -> Tensor:
    """The weight that it stands for: (out, in) in `dtype`, on a GPU."""
    steps, unit = weight.in_features // STEP, _unit(weight)
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.words.device)
    launch(
        _dequantize_kernel,
        (cdiv(weight.out_features, TILE), cdiv(steps, BLOCK_STEPS)),
        *(weight.words, weight.scale_words, out),
        *(weight.out_features, steps, weight.in_features // weight.group_size, weight.group_size // unit),
        num_warps=4,
        BITS=weight.bits,
        STEPS=BLOCK_STEPS,
        UNIT=unit,
        TILE=TILE,
    )
    return out


def few_rows_linear(x: Tensor, weight: DecodeWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x: (..., in) bf16 or fp16 of at most 32 rows; bias: (out,). Returns (..., out), on a GPU."""
    rows = x.reshape(-1, weight.in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    m = rows.shape[0]
    if m > MAX_ROWS:
        raise ValueError(f"few_rows_linear: {m} rows, at most {MAX_ROWS}")
    out = torch.empty((*x.shape[:-1], weight.out_features), dtype=x.dtype, device=x.device)
    steps, unit = weight.in_features // STEP, _unit(weight)
    whole = weight.group_size % (INNER_STEPS * STEP) == 0 or weight.group_size == weight.in_features
    launch(
        _few_rows_kernel,
        (cdiv(cdiv(weight.out_features, TILE), BLOCK_TILES) if m else 0,),
        *(rows, weight.words, weight.scale_words, bias, out),
        *(m, weight.out_features, steps, weight.in_features // weight.group_size, weight.group_size // unit),
        rows.stride(0),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        BITS=weight.bits,
        TILES=BLOCK_TILES,
        STEPS=INNER_STEPS if whole and unit == STEP else 1,  # of one scale
        UNIT=unit,
        ROWS=max(next_power_of_2(m), 16),
        TILE=TILE,
    )
    return out
