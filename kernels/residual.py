"""LayerScale and residual in one pass: y = x + scale * branch.

Where a norm follows, `residual_norm` does both; this is for the end of an encoder, where none does.
"""

import torch
from torch import Tensor

from .dispatch import target_of
from .language import kernel, next_power_of_2, row_warps, tl
from .launch import launch


@kernel()
def _scaled_residual_kernel(
    x_ptr, branch_ptr, scale_ptr, out_ptr,  # one row each
    hidden,
    BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    row = tl.program_id(0).to(tl.int64) * hidden

    x = tl.load(x_ptr + row + columns, mask=inside).to(tl.float32)
    branch = tl.load(branch_ptr + row + columns, mask=inside).to(tl.float32)
    scale = tl.load(scale_ptr + columns, mask=inside).to(tl.float32)

    tl.store(out_ptr + row + columns, (x + scale * branch).to(out_ptr.dtype.element_ty), mask=inside)


def scaled_residual(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """Add a LayerScale'd branch to the residual. x, branch: (..., hidden); scale: (hidden,). Rounds once."""
    if x.shape != branch.shape:
        raise ValueError(f"scaled_residual: x is {tuple(x.shape)}, branch {tuple(branch.shape)}")
    if target_of(x, branch, scale) is None:
        return scaled_residual_reference(x, branch, scale)
    hidden = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(hidden)
    launch(
        _scaled_residual_kernel,
        (x.numel() // hidden,),
        *(x.contiguous(), branch.contiguous(), scale, out),
        hidden,
        num_warps=row_warps(block),
        BLOCK=block,
    )
    return out


def scaled_residual_reference(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x, branch, scale)
