"""Row normalisation, alone or fused with the residual addition before it.

RMSNorm, y = w * cast(x / sqrt(mean(x^2) + eps)): statistics in fp32, cast to the input's dtype *before* the weight,
as the released models do. LayerNorm: fp32 statistics, biased variance, one rounding.
Fused: x' = x + scale * branch, with InternViT's LayerScale or without, and y = norm(x') from one pass over memory:
two reads and two writes of a row, where separate kernels need three and two.
Where the layer behind a norm multiplies 8-bit codes, y leaves as such: one byte an element, and no pass to round them.
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_extension import CpuExtension, address
from .dispatch import Target, cpu_extension, target_of
from .language import kernel, next_power_of_2, row_warps, tl
from .launch import launch
from .quantize import QuantizedRows, check_codes, empty_rows, quantize_rows_reference, quantized


@kernel()
def _norm_kernel(
    x_ptr, branch_ptr, scale_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr,  # one row each; those not needed are None
    row_scales_ptr,  # None unless `out` is codes
    hidden, x_stride,
    eps,
    BLOCK: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden

    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            branch *= tl.load(scale_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        # The norm sees the sum as it is stored, so that fused and separate kernels agree.
        x = (x + branch).to(sum_ptr.dtype.element_ty).to(tl.float32)
        tl.store(sum_ptr + row * hidden + columns, x.to(sum_ptr.dtype.element_ty), mask=inside)
    # Weights are loaded after the sums: 32 registers in place of 38, and two more rows at a time on a multiprocessor.
    if RMS:
        y = (x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)).to(x_ptr.dtype.element_ty).to(tl.float32)
        y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        centred = tl.where(inside, x - tl.sum(x, 0) / hidden, 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / hidden + eps)
        y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)

    if row_scales_ptr is not None:
        codes, row_scale = quantized(y, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * hidden + columns, codes, mask=inside)
        tl.store(row_scales_ptr + row, row_scale)
    else:
        tl.store(out_ptr + row * hidden + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, quantize: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, quantize: torch.dtype) -> QuantizedRows: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, quantize: torch.dtype | None = None) -> Tensor | QuantizedRows:
    """RMSNorm over the last dim. x: (..., hidden), its rows evenly spaced; weight: (hidden,). x's shape and dtype.

    quantize: int8 or float8_e4m3fn, for rows of such codes instead.
    """
    target = _check("rms_norm", x, weight, quantize)
    if target is None:
        extension = cpu_extension(x, weight)
        normed = rms_norm_reference(x, weight, eps) if extension is None else _on_cpu(extension, x, weight, eps)
        return _codes(normed, quantize)
    return _launch(x, None, None, weight, None, eps, quantize)[1]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Torch computes in fp32 and rounds to x's dtype before the weight comes, as the released models do.
    return weight * F.rms_norm(x, (x.shape[-1],), None, eps)


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, quantize: None = None) -> Tensor: ...
@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, quantize: torch.dtype) -> QuantizedRows: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, quantize: torch.dtype | None = None
) -> Tensor | QuantizedRows:
    """LayerNorm over the last dim. x: (..., hidden); weight, bias: (hidden,). quantize: as `rms_norm`."""
    target = _check("layer_norm", x, weight, quantize)
    if target is None:
        return _codes(layer_norm_reference(x, weight, bias, eps), quantize)
    return _launch(x, None, None, weight, bias, eps, quantize)[1]


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@overload
def residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    quantize: None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    quantize: torch.dtype,
) -> tuple[Tensor, QuantizedRows]: ...
def residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    quantize: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | QuantizedRows]:
    """(x', norm(x')) for x' = x + scale * branch: RMSNorm without a `bias`, LayerNorm with one.

    x, branch: (..., hidden), contiguous; scale (None: 1), weight, bias: (hidden,). quantize: as `rms_norm`.
    """
    if x.shape != branch.shape:
        raise ValueError(f"residual_norm: x is {tuple(x.shape)}, branch {tuple(branch.shape)}")
    target = _check("residual_norm", x, weight, quantize, branch)
    if target is None:
        # Torch's own LayerNorm is one operation already.
        extension = cpu_extension(x, branch, weight, weight if scale is None else scale) if bias is None else None
        if extension is None:
            total, normed = residual_norm_reference(x, branch, scale, weight, bias, eps)
        else:
            total = torch.empty(x.shape, dtype=x.dtype)
            normed = _on_cpu(extension, x, weight, eps, branch.contiguous(), scale, total)
        return total, _codes(normed, quantize)
    return _launch(x, branch.contiguous(), scale, weight, bias, eps, quantize)


def residual_norm_reference(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x = x + branch if scale is None else torch.addcmul(x, branch, scale)
    if bias is None:
        return x, rms_norm_reference(x, weight, eps)
    return x, layer_norm_reference(x, weight, bias, eps)


def _check(operation: str, x: Tensor, weight: Tensor, quantize: torch.dtype | None, *others: Tensor) -> Target | None:
    """The GPU that the kernel runs on, None for the reference."""
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{operation}: x has {x.shape[-1]} channels, weight {weight.shape[0]}")
    target = target_of(x, weight, *others)
    if quantize is not None:
        check_codes(quantize, target)
    return target


def _on_cpu(
    extension: CpuExtension,
    x: Tensor,
    weight: Tensor,
    eps: float,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    hidden = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, hidden)
    row_stride, step = rows.stride()
    if step != 1:
        rows, row_stride = rows.contiguous(), hidden
    out = torch.empty(x.shape, dtype=x.dtype)
    extension.rms_norm(
        *(x.dtype == torch.bfloat16, rows.shape[0], hidden, row_stride, rows.data_ptr()),
        *(address(branch), address(scale), weight.data_ptr(), address(total), out.data_ptr()),
        *(eps, torch.get_num_threads(), ""),
    )
    return out


def _codes(normed: Tensor, quantize: torch.dtype | None) -> Tensor | QuantizedRows:
    return normed if quantize is None else quantize_rows_reference(normed, quantize)


def _launch(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    quantize: torch.dtype | None,
) -> tuple[Tensor, Tensor | QuantizedRows]:
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden)  # a view for evenly spaced rows, e.g. the first channels of a wider buffer
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if branch is not None else x
    if quantize is None:
        normed: Tensor | QuantizedRows = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        normed = empty_rows(x, quantize)
    out, row_scales = normed[:2] if isinstance(normed, QuantizedRows) else (normed, None)
    block = next_power_of_2(hidden)
    launch(
        _norm_kernel,
        (rows.shape[0],),
        *(rows, branch, scale, weight, bias, total if branch is not None else None, out, row_scales),
        *(hidden, rows.stride(0)),
        eps,
        num_warps=row_warps(block),
        BLOCK=block,
        RMS=bias is None,
    )
    return total, normed
