"""y = x W^T + b with W of 8 or 4 bits: one face for every device.

A weight is scales * (q - zeros). int8: q is signed, one scale per output, no zeros. int4: q is 0..15, one scale per
output and group of inputs, zeros likewise or 8 everywhere. fp8: q is e4m3, one scale per output.
"""

import torch
from torch import Tensor

from .cpu_weight import CpuFp8Weight, CpuWeight, linear_reference
from .dispatch import target_of
from .gpu_weight import ScaledWeight, WeightOnly
from .int4_decode import LEAST_GROUP, STEP, supports
from .packed_weight import PackedWeight
from .quantize import check_codes


def pack_int8(codes: Tensor, scales: Tensor, *, weight_only: bool = False) -> PackedWeight:
    """codes: (out, in) int8; scales: (out,) float. weight_only: activations stay as they are, where the device can."""
    _check(codes, scales, torch.int8, "pack_int8")
    if target_of(codes, scales) is None:
        return CpuWeight(_offset(codes), scales.unsqueeze(-1), None, bits=8)
    if not weight_only:
        return ScaledWeight(codes, scales)
    _check_fragments(codes, 1)
    return WeightOnly(codes, scales.unsqueeze(-1))


def pack_fp8(codes: Tensor, scales: Tensor) -> PackedWeight:
    """codes: (out, in) float8_e4m3fn; scales: (out,) float. A GPU must be a Hopper; on a CPU it is emulated."""
    _check(codes, scales, torch.float8_e4m3fn, "pack_fp8")
    target = target_of(codes, scales)
    check_codes(codes.dtype, target)
    return CpuFp8Weight(codes, scales) if target is None else ScaledWeight(codes, scales)


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> PackedWeight:
    """codes: (out, in) uint8 of 0..15; scales: (out, groups) float; zeros: (out, groups) integers, or None for 8."""
    _check_groups(codes, scales, zeros, 4)
    if target_of(codes, scales) is None:
        return CpuWeight(codes, scales, zeros, bits=4)
    _check_fragments(codes, scales.shape[1])
    return WeightOnly(codes, scales, zeros)


def int8_linear_reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """codes and scales as `pack_int8` takes them; x is rounded to int8 per token."""
    return linear_reference(x, _offset(codes), scales.unsqueeze(-1), None, 8, bias)


def int4_linear_reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """codes, scales and zeros as `pack_int4` takes them; x is rounded to int8 per token and group."""
    return linear_reference(x, codes, scales, zeros, 4, bias)


def fp8_linear_reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """codes and scales as `pack_fp8` takes them; x is rounded to e4m3 per token."""
    return CpuFp8Weight(codes, scales).linear(x, bias)


def _offset(codes: Tensor) -> Tensor:
    """int8 as uint8, 128 higher."""
    return codes.view(torch.uint8) ^ 128


def _check(codes: Tensor, scales: Tensor, dtype: torch.dtype, operation: str) -> None:
    if codes.dtype != dtype:
        raise ValueError(f"{operation}: the weight must be {dtype}, got {codes.dtype}")
    if codes.dim() != 2 or scales.shape != codes.shape[:1]:
        raise ValueError(f"{operation}: scales {tuple(scales.shape)} do not fit a weight {tuple(codes.shape)}")


def _check_fragments(codes: Tensor, groups: int) -> None:
    inputs = codes.shape[1]
    if not supports(inputs, inputs // groups):
        sizes = f"{inputs} and {inputs // groups}"
        raise ValueError(f"on a GPU inputs must be multiples of {STEP} and groups of {LEAST_GROUP}, not {sizes}")


def _check_groups(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> None:
    out_features, in_features = codes.shape
    if codes.dtype != torch.uint8 or (not codes.is_meta and int(codes.max()) >> bits):
        raise ValueError(f"codes must be uint8 below {2**bits}, got {codes.dtype} up to {codes.max()}")
    if scales.dim() != 2 or len(scales) != out_features or not scales.shape[1] or in_features % scales.shape[1]:
        raise ValueError(f"scales {tuple(scales.shape)} do not fit a weight {tuple(codes.shape)}")
    group_size = in_features // scales.shape[1]
    if group_size % 8 and group_size != in_features:
        raise ValueError(f"group size {group_size} must be a multiple of 8 or all of {in_features} inputs")
    if zeros is None:
        return
    if zeros.shape != scales.shape or zeros.is_floating_point():
        raise ValueError(f"zeros must be integers {tuple(scales.shape)}, got {zeros.dtype} {tuple(zeros.shape)}")
    if not zeros.is_meta and not 0 <= zeros.min() <= zeros.max() <= 255:
        raise ValueError(f"zeros must lie in 0..255, they reach from {zeros.min()} to {zeros.max()}")
