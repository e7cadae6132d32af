"""Paged keys and values: fixed-size blocks of tokens, which a sequence holds in any order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ...kernels.dispatch import simulation
from ...kernels.quantized_cache import Cache, QuantizedCache
from ..config import DecoderConfig

# Tokens of a block: one key block of the prefill kernel, and at most 63 tokens of waste in a sequence.
BLOCK_SIZE = 64


class KVCache:
    """Keys and values of `num_blocks` blocks, all allocated at once; which sequence holds which is the caller's.

    keys, values: (layers, num_blocks, block_size, kv_heads, head_dim), contiguous on a GPU; of `dtype` int8 they are
    `QuantizedCache`s, codes with a scale for each token and head. A token's slot is block * block_size + offset.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys, self.values = (_allocate(config, num_blocks, block_size, dtype, device) for _ in range(2))

    @staticmethod
    def bytes_per_block(config: DecoderConfig, dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> int:
        """Of the keys and values of one block, in all layers."""
        scales = torch.float32.itemsize if dtype == torch.int8 else 0
        per_head = config.head_dim * dtype.itemsize + scales
        return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * per_head

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks over others."""
        for memory in self._memory():
            memory[:, list(targets)] = memory[:, list(sources)]

    def copy_from(self, other: "KVCache") -> None:
        """Take over all blocks of a smaller cache."""
        for ours, theirs in zip(self._memory(), other._memory(), strict=True):
            ours[:, : other.num_blocks] = theirs

    def _memory(self) -> Iterator[Tensor]:
        """All there is: (layers, num_blocks, ...) each."""
        for cache in (self.keys, self.values):
            if isinstance(cache, QuantizedCache):
                yield cache.codes
                yield cache.scales
            else:
                yield cache


def _allocate(
    config: DecoderConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> Cache:
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    # A CPU reads the tokens of one head after the other: together they are, in neighbouring blocks, one matrix.
    heads_first = device.type == "cpu" and simulation() is None

    def zeros(dtype: torch.dtype, *channels: int) -> Tensor:
        if not heads_first:
            return torch.zeros((layers, num_blocks, block_size, kv_heads, *channels), dtype=dtype, device=device)
        memory = torch.zeros((layers, kv_heads, num_blocks, block_size, *channels), dtype=dtype, device=device)
        return memory.movedim(1, 3)

    values = zeros(dtype, config.head_dim)
    return QuantizedCache(values, zeros(torch.float32)) if dtype == torch.int8 else values


@dataclass(frozen=True)
class KVBatch:
    """Where the packed tokens of one pass go in a cache, and what each of its sequences attends to.

    slot_mapping: (num_tokens,) int64, -1 where a token is padding. block_tables: (num_seqs, max_blocks) int32.
    cu_seqlens_q: (num_seqs + 1,) int32, where each sequence's new tokens begin. context_lens: (num_seqs,) int32, tokens
    of each sequence in the cache after this pass. max_seqlen_q: the most new tokens of one sequence.
    """

    cache: KVCache
    slot_mapping: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    max_seqlen_q: int

    @classmethod
    def of(
        cls,
        cache: KVCache,
        block_tables: Sequence[Sequence[int]],
        context_lens: Sequence[int],
        num_new_tokens: Sequence[int],
    ) -> "KVBatch":
        """The batch of sequences whose last `num_new_tokens` tokens are new. Raises `ValueError` for a short table."""
        size, device = cache.block_size, cache.keys.device
        slots: list[int] = []
        for table, context, new in zip(block_tables, context_lens, num_new_tokens, strict=True):
            if context > len(table) * size or new > context:
                raise ValueError(
                    f"kv cache: {new} new tokens of {context} do not fit a table of {len(table)} blocks of {size}"
                )
            position = context - new
            while position < context:  # block by block
                place = table[position // size] * size + position % size
                count = min(size - position % size, context - position)
                slots += range(place, place + count)
                position += count
        widest = max(len(table) for table in block_tables)
        tables = [[*table, *[0] * (widest - len(table))] for table in block_tables]
        return cls(
            cache,
            torch.tensor(slots, device=device),
            torch.from_numpy(np.array(tables, dtype=np.int32)).to(device),  # a third of the time where there are many
            torch.tensor([0, *accumulate(num_new_tokens)], dtype=torch.int32, device=device),
            torch.tensor(context_lens, dtype=torch.int32, device=device),
            max(num_new_tokens),
        )
