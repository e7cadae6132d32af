"""y = x W^T + b, plain and with the exact (erf) GELU as epilogue.

Plain projections are the library's: cuBLASLt adds the bias in its epilogue and multiplies at least as fast as Triton.
Its GELU epilogue is the tanh form, which InternVL does not use: with GELU there is something to fuse, see gemm.py.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm
from .activation import gelu
from .dispatch import Arch, Choice, target_of
from .language import cdiv, kernel, tl
from .launch import launch

CONFIGS: Mapping[Arch, tuple[Choice, ...]] = gemm.CONFIGS  # what `linear_gelu` chooses from
BLOCK = 2048  # elements of a program: two words of 16 bytes for each of its 128 threads


@kernel()
def _gelu_kernel(
    y_ptr,  # contiguous rows, overwritten
    num_columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    y_ptrs = y_ptr + row * num_columns + columns
    y = tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptrs, gelu(y).to(y_ptr.dtype.element_ty), mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., in); weight: (out, in); bias: (out,) or None. Returns (..., out)."""
    return linear_reference(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x W^T + b) with the erf form of GELU. Shapes as in `linear`."""
    if x.shape[-1] != weight.shape[1] or weight.shape[0] != bias.shape[0]:
        raise ValueError(
            f"linear_gelu: x has {x.shape[-1]} channels, weight is {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )
    target = target_of(x, weight, bias)
    if target is None or x.dtype == torch.float32:
        return linear_gelu_reference(x, weight, bias)
    y = gemm.fused_linear("gelu", target, x, weight, bias)
    return _gelu_(linear(x, weight, bias)) if y is None else y


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _gelu_(y: Tensor) -> Tensor:
    """GELU in place. y: (..., columns), contiguous."""
    columns = y.shape[-1]
    launch(_gelu_kernel, (y.numel() // columns, cdiv(columns, BLOCK)), y, columns, num_warps=4, BLOCK=BLOCK)
    return y
