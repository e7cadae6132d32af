"""Row normalisation.

RMSNorm, y = w * cast(x / sqrt(mean(x^2) + eps)): statistics in fp32, cast to the input's dtype *before* the weight,
as the released models do. LayerNorm: fp32 statistics, biased variance, one rounding.
InternViT's QK-norm is this RMSNorm over all heads of a token at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim. x: (..., hidden); weight: (hidden,). Returns x's shape and dtype."""
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(f"rms_norm: x has {x.shape[-1]} channels, weight {weight.shape[0]}")
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    normalized = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dim. x: (..., hidden); weight, bias: (hidden,). Returns x's shape and dtype."""
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(f"layer_norm: x has {x.shape[-1]} channels, weight {weight.shape[0]}")
    return layer_norm_reference(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
