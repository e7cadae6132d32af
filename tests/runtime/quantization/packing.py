"""Quantised tensors of single linear layers, packed as each format defines it, with the weight that they stand for.

Written from the definitions and not from vitrail's readers: words are filled nibble by nibble.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
NF4 = [  # quantiles of a normal distribution, as published with QLoRA
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def words_of(q: Tensor, order: list[int]) -> Tensor:
    """(rows, columns) of 0..15 to int32 words of eight columns: nibble i of word c holds column 8 c + order[i]."""
    values = q.numpy().astype(np.uint32)
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate(order):
            words[:, word] |= values[:, 8 * word + column] << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32).copy())


def rounded(weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Some codes (out, in), scales (out, groups) exact in fp16, and zeros of 1..15 for a weight; not the nearest."""
    groups = weight.unflatten(1, (-1, size))
    scales = (groups.abs().amax(2) / 7).half().float()
    zeros = torch.randint(6, 11, scales.shape, generator=generator)
    q = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15).flatten(1)
    return q.to(torch.uint8), scales, zeros.to(torch.uint8)


def value(q: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """scales * (q - zeros), element by element."""
    return scales[:, groups] * (q.float() - zeros.float()[:, groups])


def awq(weight: Tensor, size: int, generator: torch.Generator) -> tuple[Tensors, Tensor]:
    q, scales, zeros = rounded(weight, size, generator)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        ".qweight": words_of(q.t(), order),
        ".qzeros": words_of(zeros.t(), order),
        ".scales": scales.t().contiguous().half(),
    }
    return tensors, value(q, scales, zeros, torch.arange(q.shape[1]) // size)


def gptq(
    weight: Tensor, size: int, generator: torch.Generator, *, groups: Tensor | None = None, version: int = 1
) -> tuple[Tensors, Tensor]:
    """groups: (in,), the group of each input, for act-order."""
    if groups is None:
        groups = torch.arange(weight.shape[1]) // size
    scales = (torch.rand(weight.shape[0], int(groups.max()) + 1, generator=generator) * 0.02 + 0.01).half().float()
    zeros = torch.randint(6, 11, scales.shape, generator=generator).to(torch.uint8)
    q = ((weight / scales[:, groups]).round() + zeros[:, groups]).clamp(0, 15).to(torch.uint8)
    in_order = list(range(8))
    tensors = {
        ".qweight": words_of(q, in_order).t().contiguous(),
        ".qzeros": words_of(zeros.t() - (1 if version == 1 else 0), in_order),
        ".scales": scales.t().contiguous().half(),
        ".g_idx": groups.int(),
    }
    return tensors, value(q, scales, zeros, groups)


def bnb_int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    largest = weight.abs().amax(1)
    codes = (weight * (127 / largest[:, None])).round().to(torch.int8)
    tensors = {".weight": codes, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * largest[:, None] / 127


def bnb_nf4(weight: Tensor) -> tuple[Tensors, Tensor]:
    """Without nested scales. Blocks of 64 values of the whole weight, wherever rows end."""
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(1)
    levels = torch.tensor(NF4)
    q = ((flat / largest[:, None])[..., None] - levels).abs().argmin(2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    pairs = q.flatten()[: weight.numel()].view(-1, 2)
    tensors = {
        ".weight": (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None],
        ".weight.absmax": largest,
        ".weight.quant_map": levels,
        ".weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return tensors, (levels[q] * largest[:, None]).flatten()[: weight.numel()].view_as(weight)


def w8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    codes = (weight / scales).round().clamp(-128, 127).to(torch.int8)
    return {".weight": codes, ".weight_scale": scales.bfloat16()}, codes.float() * scales


def w8_packed(weight: Tensor) -> tuple[Tensors, Tensor]:
    plain, meant = w8(weight)
    raised = (plain[".weight"].int() + 128).numpy().astype(np.uint32)
    words = np.zeros((raised.shape[0], raised.shape[1] // 4), np.uint32)
    for column in range(raised.shape[1]):
        words[:, column // 4] |= raised[:, column] << np.uint32(8 * (column % 4))
    tensors = {
        ".weight_packed": torch.from_numpy(words.view(np.int32).copy()),
        ".weight_scale": plain[".weight_scale"],
        ".weight_shape": torch.tensor(weight.shape),
    }
    return tensors, meant


def w4(
    weight: Tensor, size: int, generator: torch.Generator, *, symmetric: bool, groups: Tensor | None = None
) -> tuple[Tensors, Tensor]:
    """Signed values of -8..7, raised by 8 in the words, zero points likewise."""
    unsorted = groups is not None
    if groups is None:
        groups = torch.arange(weight.shape[1]) // size
    scales = (torch.rand(weight.shape[0], int(groups.max()) + 1, generator=generator) * 0.02 + 0.01).half().float()
    zeros = torch.zeros(scales.shape) if symmetric else torch.randint(-2, 3, scales.shape, generator=generator).float()
    q = ((weight / scales[:, groups]).round() + zeros[:, groups]).clamp(-8, 7)
    in_order = list(range(8))
    tensors = {
        ".weight_packed": words_of(q + 8, in_order),
        ".weight_scale": scales.half(),
        ".weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = words_of((zeros + 8).t(), in_order).t().contiguous()
    if unsorted:
        tensors[".weight_g_idx"] = groups.int()
    return tensors, value(q, scales, zeros, groups)


def fp8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scales}, codes.float() * scales


def scheme(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, store: str) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": store,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["re:vision_model.*", "re:mlp1.*", "language_model.lm_head"],
        "kv_cache_scheme": None,
    }
