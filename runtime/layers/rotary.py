"""Rotary frequencies of a request, by the scaling rule its model was trained with."""

import torch
from torch import Tensor

from ..config import DecoderConfig


def inverse_frequencies(config: DecoderConfig, planned_length: int = 0) -> Tensor:
    """(head_dim / 2,) fp32: theta^(-2j / d), scaled for a request of `planned_length` tokens, prompt and answer.

    One request keeps one set of frequencies: dynamic NTK and LongRoPE switch on the *planned* length, so that cached
    keys and new queries always agree. Dynamic NTK raises theta by (F n / M - (F - 1))^(d / (d - 2)) beyond M tokens.
    """
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    scaling = config.rope_scaling
    theta = config.rope_theta
    if scaling is None:
        return 1.0 / theta**exponents
    if scaling.rope_type == "linear":
        return 1.0 / theta**exponents / scaling.factor
    if scaling.rope_type == "longrope":
        long = planned_length > scaling.original_max_position_embeddings
        factors = torch.tensor(scaling.long_factor if long else scaling.short_factor)
        return 1.0 / (factors * theta**exponents)
    limit = config.max_position_embeddings
    if planned_length > limit:
        growth = scaling.factor * planned_length / limit - (scaling.factor - 1)
        theta *= growth ** (dim / (dim - 2))
    return 1.0 / theta**exponents
