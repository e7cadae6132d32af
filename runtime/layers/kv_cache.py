"""Preallocated keys and values, one row per running sequence."""

import torch
from torch import Tensor

from ..config import DecoderConfig


class KVCache:
    """Keys and values of up to `rows` sequences of up to `length` tokens, all allocated at once.

    keys, values: (layers, rows, kv_heads, length, head_dim). Rows 0..n-1 are in use; who uses which is the caller's.
    """

    def __init__(
        self, config: DecoderConfig, rows: int, length: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` over row `target`."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def clear_row(self, row: int) -> None:
        """Forget all that row `row` holds, NaN included."""
        self.keys[:, row].zero_()
        self.values[:, row].zero_()

    def copy_from(self, other: "KVCache", rows: int) -> None:
        """Take over the first `rows` rows of a smaller cache."""
        length = min(self.length, other.length)
        self.keys[:, :rows, :, :length] = other.keys[:, :rows, :, :length]
        self.values[:, :rows, :, :length] = other.values[:, :rows, :, :length]


class KVSlice:
    """The part of a `KVCache` that one forward pass writes and reads: rows, new positions and context lengths.

    positions: (rows, tokens) int64 where the new tokens of rows `first_row..` go.
    context: longest context after this pass; context_lens: (rows,) int64, or None if all rows have `context` tokens.
    """

    def __init__(
        self, cache: KVCache, first_row: int, positions: Tensor, context: int, context_lens: Tensor | None = None
    ) -> None:
        if context > cache.length:
            raise ValueError(f"kv cache: context {context} exceeds the {cache.length} tokens allocated")
        rows = slice(first_row, first_row + positions.shape[0])
        self.keys = cache.keys[:, rows]
        self.values = cache.values[:, rows]
        self.positions = positions
        self.context = context
        self.context_lens = context_lens

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (rows, tokens, kv_heads, d) of one layer; return all keys and values up to `context`."""
        keys, values = self.keys[layer], self.values[layer]
        if self.context_lens is None:
            start = self.context - k.shape[1]
            keys[:, :, start : self.context] = k.transpose(1, 2)
            values[:, :, start : self.context] = v.transpose(1, 2)
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            keys[rows, :, self.positions] = k
            values[rows, :, self.positions] = v
        return keys[:, :, : self.context], values[:, :, : self.context]
