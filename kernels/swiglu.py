"""SwiGLU's gate: SiLU(gate) * up, on the output of one joint projection."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up: (..., 2 * intermediate), gate first. Returns (..., intermediate)."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: {gate_up.shape[-1]} channels do not split into gate and up")
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
