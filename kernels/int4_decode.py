"""y = x W^T for up to 32 rows and weights of 4 or 8 bits, in CUDA C++ (csrc/cuda/int4_decode.cu): decoding.

W = scales * (q - zeros). The time is that of reading W, once: its codes stand in memory as the tensor cores take them,
and become numbers in registers, exactly.
"""

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cubins
from .cubins import CudaKernel

MAX_ROWS = 32
STEP = 64  # inputs that a warp multiplies at a time
LEAST_GROUP = 32  # inputs of a scale; groups that end within a step are for Triton (dequantize.py)
TILE = 16  # outputs of a fragment
FRAGMENT = 512  # bytes: 16 a lane
PADDED_TO = 32  # outputs
ZERO_POINT = {4: 8, 8: 128}  # of symmetric codes
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Variant(NamedTuple):
    """A kernel of int4_decode.cu: most rows, and the outputs of a CTA.

    `beside`: how many of its warps have outputs of their own; the others split the inputs into `slices`. Weights come
    through a ring of `stages` of `depth` steps each.
    """

    bits: int
    rows: int
    outputs: int
    beside: int
    slices: int
    depth: int
    stages: int

    def kernel(self, dtype: torch.dtype) -> CudaKernel:
        tiles = self.outputs // TILE
        stage = self.depth * (tiles * self.bits // 4 * FRAGMENT + self.rows // 8 * 2 * FRAGMENT) + tiles * 64
        name = f"int{self.bits}_decode_{DTYPES[dtype]}_{self.rows}x{self.outputs}"
        return CudaKernel("int4_decode", name, 32 * self.beside * self.slices, self.slices * self.stages * stage)

    def takes(self, weight: "DecodeWeight", gated: bool) -> bool:
        """Whether the weight's outputs fill CTAs, and its groups stages."""
        outputs = weight.out_features if gated else weight.out_features + -weight.out_features % PADDED_TO
        fits = outputs % self.outputs == 0 and weight.group_size % (self.depth * STEP) == 0
        return fits and self.bits == weight.bits


# For one number of rows the narrow ones first.
VARIANTS = (
    Variant(4, 8, 32, 1, 8, 2, 3),
    Variant(4, 8, 64, 1, 4, 2, 3),
    Variant(4, 16, 32, 1, 8, 1, 3),
    Variant(4, 16, 64, 1, 4, 1, 4),
    Variant(4, 32, 32, 1, 4, 1, 3),
    Variant(4, 32, 64, 2, 4, 1, 4),
    Variant(4, 32, 128, 2, 4, 1, 4),
    Variant(8, 8, 32, 1, 4, 2, 3),
    Variant(8, 16, 32, 1, 4, 1, 4),
    Variant(8, 32, 32, 1, 4, 1, 3),
    Variant(8, 32, 128, 2, 4, 1, 3),
)


class DecodeWeight:
    """A weight laid out for `int4_decode`, on the device of its codes.

    codes: (out, in), uint8 of 0..15, or int8; scales: (out, groups) float; zeros: (out, groups) integers of 0..127,
    or None for 8; for int8 there are no zeros and one group. in is a multiple of 64, a group of 32.

    words: (tiles of 16 outputs, steps of 64 inputs, loads, 32 lanes, 16) bytes. With lane = 4 g + t, byte pair p, and
    input 16 t + 4 k + 2 b + i of a step: 4 bits, one load: output g + 8 h in nibble 8 k + 4 i + 2 b + h. 8 bits, two
    loads: load k / 2, byte 8 (k % 2) + 4 b + 2 i + h, each code 128 higher.
    scale_words: (tiles, groups, 8, 2) float32 as int32, for the outputs g and g + 8, each the nearest to its scale
    whose last 8 bits are the zero: off by 2^-16 of it at most. Outputs are filled up to a multiple of 32.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        self.bits = 8 if codes.dtype == torch.int8 else 4
        self.out_features, self.in_features = codes.shape
        self.group_size = self.in_features // scales.shape[1]
        _check(codes, scales, zeros, self.bits)
        padding = (0, 0, 0, -self.out_features % PADDED_TO)
        self.words = _pack_codes(F.pad(codes.view(torch.uint8) ^ (128 if self.bits == 8 else 0), padding), self.bits)
        if zeros is None:
            zeros = torch.full_like(scales, ZERO_POINT[self.bits], dtype=torch.int32)
        self.scale_words = _pack_scales(F.pad(scales.float(), padding), F.pad(zeros.int(), padding))

    def dequantize(self) -> Tensor:
        """The weight that it stands for: (out, in) fp32."""
        codes = _unpack_codes(self.words, self.bits).unflatten(1, (-1, self.group_size))
        scales = self.scale_words.permute(0, 3, 2, 1).flatten(0, 2).contiguous().unsqueeze(-1)
        matrix = (codes.float() - (scales & 0xFF)) * scales.view(torch.float32)
        return matrix.flatten(1)[: self.out_features]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """`dequantize` rounded to bf16 or fp16, by a kernel where there is one: for products with many rows."""
        if dtype not in DTYPES or self.group_size % STEP or not cubins.available(self.words.device):
            return self.dequantize().to(dtype)
        matrix = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.words.device)
        kernel = _dequantize_kernel(self.bits, dtype)
        grid = -(-self.out_features // TILE) * (self.in_features // STEP)
        cubins.launch(
            kernel,
            -(-grid // (kernel.threads // 32)),
            *(self.words, self.scale_words, matrix),
            *(self.out_features, self.in_features, self.group_size),
        )
        return matrix


def _dequantize_kernel(bits: int, dtype: torch.dtype) -> CudaKernel:
    return CudaKernel("int4_decode", f"int{bits}_dequantize_{DTYPES[dtype]}", 128, 0)


def kernels() -> list[CudaKernel]:
    """All that int4_decode.cu has."""
    dequantize = [_dequantize_kernel(bits, dtype) for bits in ZERO_POINT for dtype in DTYPES]
    return [variant.kernel(dtype) for variant in VARIANTS for dtype in DTYPES] + dequantize


def supports(in_features: int, group_size: int) -> bool:
    """Whether a weight of that shape can be laid out as a `DecodeWeight`."""
    return in_features % STEP == 0 and group_size % LEAST_GROUP == 0


def int4_decode(
    x: Tensor,
    weight: DecodeWeight,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    variant: Variant | None = None,
) -> Tensor:
    """x W^T + b, or SiLU(x G^T) * (x U^T) where `gated`: the first half of the weight's outputs is G.

    x: (..., in) bf16 or fp16 of at most 32 rows; bias: (out,) in x's type, not where gated. Returns (..., out), or
    (..., out / 2). The same rows give the same bits whatever the others are, as long as the variant is the same.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    outputs = weight.out_features
    if x.shape[-1] != weight.in_features or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"int4_decode: x has {x.shape[-1]} channels, the weight is {(outputs, weight.in_features)}, "
            f"bias {None if bias is None else tuple(bias.shape)}"
        )
    if rows > MAX_ROWS:
        raise ValueError(f"int4_decode: {rows} rows, at most {MAX_ROWS}")
    if gated and (bias is not None or outputs % 2):
        raise ValueError(f"int4_decode: {outputs} outputs{'' if bias is None else ' with a bias'} cannot be gated")
    if x.dtype not in DTYPES or (bias is not None and bias.dtype != x.dtype) or not cubins.available(x.device):
        return int4_decode_reference(x, weight, bias, gated=gated)
    if variant is None:
        variant = choose_variant(weight, rows, gated, cubins.num_sms(x.device))
    kernel = None if variant is None else variant.kernel(x.dtype)
    if variant is None or kernel is None or not cubins.available(x.device, kernel.shared):
        return int4_decode_reference(x, weight, bias, gated=gated)
    y = torch.empty(*x.shape[:-1], outputs // (2 if gated else 1), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    flat = x.reshape(rows, weight.in_features)
    if flat.stride(1) != 1 or flat.stride(0) % 8 or flat.data_ptr() % 16:
        flat = flat.clone(memory_format=torch.contiguous_format)
    cubins.launch(
        kernel,
        -(-outputs // variant.outputs),
        *(weight.words, weight.scale_words, flat, bias, y),
        *(rows, outputs, weight.in_features, weight.group_size, int(gated)),
        ctypes.c_int64(flat.stride(0)),
    )
    return y


def choose_variant(weight: DecodeWeight, rows: int, gated: bool, sms: int) -> Variant | None:
    """The kernel for that many rows; None where gates do not fill fragments.

    A wide CTA reads the activations for more outputs: with rows x channels of them for every `outputs` rows of the
    weight, that decides from about four rows on, unless it leaves many SMs without a CTA.
    """
    fitting = [variant for variant in VARIANTS if variant.rows >= rows and variant.takes(weight, gated)]
    fitting = [variant for variant in fitting if variant.rows == fitting[0].rows]
    wide = [variant for variant in fitting if rows > 4 and weight.out_features >= 0.7 * sms * variant.outputs]
    return wide[-1] if wide else next(iter(fitting), None)


def int4_decode_reference(
    x: Tensor, weight: DecodeWeight, bias: Tensor | None = None, *, gated: bool = False
) -> Tensor:
    """Dequantise, then multiply, in fp32."""
    y = F.linear(x.float(), weight.dequantize(), None if bias is None else bias.float())
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y.to(x.dtype)


def _check(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> None:
    outputs, inputs = codes.shape
    valued = codes.numel() and not codes.is_meta
    if codes.dtype not in (torch.uint8, torch.int8) or (bits == 4 and valued and int(codes.max()) > 15):
        raise ValueError(f"codes must be uint8 of 0..15 or int8, got {codes.dtype} up to {codes.max()}")
    if scales.dim() != 2 or len(scales) != outputs or inputs % scales.shape[1]:
        raise ValueError(f"scales {tuple(scales.shape)} do not fit codes {tuple(codes.shape)}")
    if not supports(inputs, inputs // scales.shape[1]):
        raise ValueError(
            f"{inputs} inputs in groups of {inputs // scales.shape[1]}: must be multiples of {STEP} and {LEAST_GROUP}"
        )
    if bits == 8 and (zeros is not None or scales.shape[1] != 1):
        raise ValueError("a weight of 8 bits has one scale an output and no zeros")
    if zeros is not None and (zeros.shape != scales.shape or zeros.is_floating_point()):
        raise ValueError(f"zeros must be integers {tuple(scales.shape)}, got {zeros.dtype} {tuple(zeros.shape)}")
    if zeros is not None and valued and not 0 <= int(zeros.min()) <= int(zeros.max()) <= 127:
        raise ValueError(f"zeros must lie in 0..127, they reach from {zeros.min()} to {zeros.max()}")


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(out, in) uint8 as the words of `DecodeWeight`."""
    outputs, inputs = codes.shape
    # tile, h, g, step, t, k / 2, k % 2, b, i
    parts = codes.view(outputs // TILE, 2, 8, inputs // STEP, 4, 2, 2, 2, 2)
    if bits == 8:
        ordered = parts.permute(0, 3, 5, 2, 4, 6, 7, 8, 1)  # tile, step, k / 2; g, t; k % 2, b, i, h
        return ordered.reshape(outputs // TILE, inputs // STEP, 2, 32, 16)
    low, high = parts.permute(0, 3, 2, 4, 5, 6, 8, 7, 1).unbind(-1)  # tile, step; g, t; k, i, b; h
    return (low | high << 4).reshape(outputs // TILE, inputs // STEP, 1, 32, 16)


def _unpack_codes(words: Tensor, bits: int) -> Tensor:
    """What `_pack_codes` was given."""
    tiles, steps = words.shape[:2]
    if bits == 8:
        ordered = words.view(tiles, steps, 2, 8, 4, 2, 2, 2, 2)
        parts = ordered.permute(0, 8, 3, 1, 4, 2, 5, 6, 7)
    else:
        nibbles = torch.stack((words & 15, words >> 4), dim=-1).view(tiles, steps, 8, 4, 2, 2, 2, 2, 2)
        parts = nibbles.permute(0, 8, 2, 1, 3, 4, 5, 7, 6)
    return parts.reshape(tiles * TILE, steps * STEP)


def _pack_scales(scales: Tensor, zeros: Tensor) -> Tensor:
    """(out, groups) each, as the scale words of `DecodeWeight`."""
    rounded = (scales.contiguous().view(torch.int32) - zeros + 0x80) & ~0xFF
    words = (rounded | zeros).view(-1, 2, 8, scales.shape[1])
    return words.permute(0, 3, 2, 1).contiguous()
