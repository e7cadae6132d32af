"""SwiGLU's gate: SiLU(gate) * up, on the output of one joint projection or in that projection's epilogue."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm
from .activation import silu
from .dispatch import Arch, Choice, target_of
from .language import cdiv, kernel, tl
from .launch import launch

CONFIGS: Mapping[Arch, tuple[Choice, ...]] = gemm.CONFIGS  # what `linear_swiglu` chooses from
BLOCK = 1024  # results of a program: one word of 16 bytes of gate and one of up for each of its 128 threads


@kernel()
def _swiglu_kernel(
    gate_up_ptr, out_ptr,
    intermediate, gate_up_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < intermediate
    gate_ptrs = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + intermediate, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * intermediate + columns, (silu(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up: (..., 2 * intermediate), gate first. Returns (..., intermediate)."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: {gate_up.shape[-1]} channels do not split into gate and up")
    if target_of(gate_up) is None:
        return swiglu_reference(gate_up)
    intermediate = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * intermediate)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty((*gate_up.shape[:-1], intermediate), dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows.shape[0], cdiv(intermediate, BLOCK))
    launch(_swiglu_kernel, grid, rows, out, intermediate, rows.stride(0), num_warps=4, BLOCK=BLOCK)
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_swiglu(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """SiLU(x Wg^T) * (x Wu^T). x: (..., hidden); gate_up_weight: (2 * intermediate, hidden), the rows of Wg first.

    Fused, the projection is not rounded to x's dtype before the activation, as it is where it goes through memory.
    """
    if gate_up_weight.shape[0] % 2 or gate_up_weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear_swiglu: x has {x.shape[-1]} channels, the weight of gate and up is {tuple(gate_up_weight.shape)}"
        )
    target = target_of(x, gate_up_weight)
    if target is None:
        return linear_swiglu_reference(x, gate_up_weight)
    y = gemm.fused_linear("swiglu", target, x, gate_up_weight, None)
    return swiglu(F.linear(x, gate_up_weight)) if y is None else y


def linear_swiglu_reference(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    return swiglu_reference(F.linear(x, gate_up_weight))
