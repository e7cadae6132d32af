"""Rotary position embedding in the half-rotation (NeoX) layout.

Channels j and j + d/2 turn together by the angle position * inv_freq[j]. The tables are made in fp32 and cast to the
activations' dtype before the multiply, as the released models do.
"""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for `apply_rope`, both (batch, tokens, 1, head_dim) in `dtype`.

    positions: (batch, tokens) int64. inv_freq: (head_dim / 2,) or (batch, head_dim / 2) fp32.
    """
    frequencies = inv_freq if inv_freq.dim() == 2 else inv_freq[None]
    angles = positions[:, :, None].float() * frequencies[:, None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys. x: (batch, tokens, heads, head_dim), any strides; cos, sin: from `rotary_table`."""
    if x.shape[-1] != cos.shape[-1]:
        raise ValueError(f"apply_rope: x has head_dim {x.shape[-1]}, the table {cos.shape[-1]}")
    return apply_rope_reference(x, cos, sin)


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
