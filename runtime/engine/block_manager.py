"""Which blocks of the KV cache belong to which sequence. Plain Python: no torch, no clock."""

from collections.abc import Hashable


class BlockManager:
    """Lends blocks 0..num_blocks-1, `block_size` tokens each, to owners."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))  # ascending
        self._tables: dict[Hashable, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, owner: Hashable, num_tokens: int) -> list[int]:
        """The block table for a new owner of `num_tokens` tokens. Raises `ValueError` when there are too few blocks.

        Neighbouring blocks where there are enough: a CPU reads them in place, where it has to gather others.
        """
        count = self.blocks_for(num_tokens)
        if owner in self._tables or count > len(self._free):
            raise ValueError(f"block manager: {owner!r} asks for {count} blocks, {len(self._free)} are free")
        starts = range(len(self._free) - count + 1)
        first = next((at for at in starts if self._free[at + count - 1] - self._free[at] == count - 1), 0)
        table = self._free[first : first + count]
        del self._free[first : first + count]
        self._tables[owner] = table
        return table

    def table(self, owner: Hashable) -> list[int]:
        """The blocks of `owner`, in the order of its tokens."""
        return self._tables[owner]

    def free(self, owner: Hashable) -> None:
        """Take back what `owner` holds, if anything."""
        self._free = sorted([*self._free, *self._tables.pop(owner, [])])

    def grow(self, num_blocks: int) -> None:
        """Lend blocks up to `num_blocks` from now on."""
        if num_blocks < self.num_blocks:
            raise ValueError(f"block manager: cannot shrink from {self.num_blocks} to {num_blocks} blocks")
        self._free.extend(range(self.num_blocks, num_blocks))
        self.num_blocks = num_blocks

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every block is free once or lent to one owner once."""
        lent = [block for table in self._tables.values() for block in table]
        assert self._free == sorted(self._free), "free blocks out of order"
        assert sorted([*self._free, *lent]) == list(range(self.num_blocks)), "a block is lost or lent twice"
