"""Cached keys or values in 8 bits: half the memory, so twice the sequences, and half of what decoding has to read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .quantize import quantize_rows_reference


@dataclass(frozen=True)
class QuantizedCache:
    """int8 codes with a scale for each token and head: tokens are written once, alone, and never rounded again.

    codes: (..., num_blocks, block_size, kv_heads, d) int8; scales: (..., num_blocks, block_size, kv_heads) fp32.
    """

    codes: Tensor
    scales: Tensor

    def __getitem__(self, index: Any) -> "QuantizedCache":
        """A part, along the dimensions that both have."""
        return QuantizedCache(self.codes[index], self.scales[index])

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def is_contiguous(self) -> bool:
        """Whether the codes are, and the scales."""
        return self.codes.is_contiguous() and self.scales.is_contiguous()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stands for, in the shape of the codes."""
        return (self.codes.float() * self.scales.unsqueeze(-1)).to(dtype)


Cache = Tensor | QuantizedCache


def codes_of(cache: Cache) -> Tensor:
    """What a kernel reads of a cache at each channel."""
    return cache.codes if isinstance(cache, QuantizedCache) else cache


def scales_of(cache: Cache) -> Tensor | None:
    """The scales of its tokens and heads, where it has any."""
    return cache.scales if isinstance(cache, QuantizedCache) else None


def write_reference(cache: Cache, slots: Tensor, tokens: Tensor) -> None:
    """Put tokens (num_tokens, kv_heads, d) into slots of a cache (num_blocks, block_size, kv_heads, d)."""
    if isinstance(cache, QuantizedCache):
        rows = quantize_rows_reference(tokens)
        assert rows.scales is not None
        cache.scales.view(-1, *tokens.shape[1:2]).index_copy_(0, slots, rows.scales)
        cache, tokens = cache.codes, rows.codes
    cache.view(-1, *tokens.shape[1:]).index_copy_(0, slots, tokens)
