"""Which blocks of the KV cache belong to which sequence, and what of them later ones may use. No torch, no clock.

A block has one of three states. *Free*: it holds nothing of use. *Used*: it stands in the tables of one or more owners,
as many as its references. *Idle*: no table holds it, but its content is known by a key and waits for whoever has the
same prefix; idle blocks are taken again when no free one is left, the one least recently used first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import sha256


def block_key(parent: bytes, token_ids: Sequence[int], image_keys: Iterable[bytes]) -> bytes:
    """The key of a full block: of its tokens, of the images that they show, and of all blocks before it.

    parent: the key of the block before, or what the whole sequence hangs on. Keys are 32 bytes and blocks are of one
    size, so that no two contents spell the same bytes.
    """
    digest = sha256(parent)
    digest.update(array("q", token_ids).tobytes())
    for key in image_keys:
        digest.update(key)
    return digest.digest()


class BlockManager:
    """Lends blocks 0..num_blocks-1, `block_size` tokens each, to owners; with none left it adds some, up to `limit`."""

    def __init__(self, num_blocks: int, block_size: int, *, limit: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.limit = num_blocks if limit is None else limit
        self.num_evicted = 0
        self._free = dict.fromkeys(reversed(range(num_blocks)))  # the last one is lent first
        self._tables: dict[Hashable, list[int]] = {}
        self._references: dict[int, int] = {}
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that can be lent without making more, idle ones among them."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def available(self) -> int:
        """Blocks that can be lent."""
        return self.num_free + max(0, self.limit - self.num_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def cached(self, keys: Sequence[bytes]) -> int:
        """How many of the first `keys` name a block whose content is there."""
        return next((count for count, key in enumerate(keys) if key not in self._block_of), len(keys))

    def cost(self, num_tokens: int, shared: Sequence[bytes] = ()) -> int:
        """How many of the available blocks `allocate` would take; an idle one that is shared counts, a used one not."""
        used = sum(self._block_of[key] not in self._idle for key in shared)
        return self.blocks_for(num_tokens) - used

    def allocate(self, owner: Hashable, num_tokens: int, shared: Sequence[bytes] = ()) -> list[int]:
        """The block table for a new owner of `num_tokens` tokens: first the blocks of the keys `shared`, then new ones.

        Raises `ValueError` when there are too few blocks.
        """
        count = self.cost(num_tokens, shared)
        if owner in self._tables or count > self.available:
            raise ValueError(f"block manager: {owner!r} asks for {count} blocks, {self.available} are free")
        table = [self._block_of[key] for key in shared]
        for block in table:
            self._hold(block)  # before others are taken, which might evict it
        self._tables[owner] = table
        table += self._take(self.blocks_for(num_tokens) - len(table))
        return table

    def reserve(self, owner: Hashable, num_tokens: int) -> list[tuple[int, int]] | None:
        """Let `owner` write its last of `num_tokens` tokens: to a further block if need be, or a copy of a shared one.

        Returns the blocks (source, target) to be copied before, or None when no block is left; then nothing changed.
        """
        table = self._tables[owner]
        last = (num_tokens - 1) // self.block_size
        missing = last + 1 - len(table)
        copied = missing <= 0 and self._references[table[last]] > 1
        if max(missing, copied) > self.available:
            return None
        if not copied:
            if missing > 0:
                table += self._take(missing, after=table[-1] if table else None)
            return []
        source, (target,) = table[last], self._take(1)
        table[last] = target
        self._references[source] -= 1
        return [(source, target)]

    def fork(self, owner: Hashable, other: Hashable) -> None:
        """Give `other` the blocks of `owner`; whoever writes to one of them first gets a copy (`reserve`)."""
        if other in self._tables:
            raise ValueError(f"block manager: {other!r} has blocks already")
        self._tables[other] = list(self._tables[owner])
        for block in self._tables[other]:
            self._references[block] += 1

    def publish(self, owner: Hashable, keys: Sequence[bytes]) -> None:
        """Name the first full blocks of `owner` by `keys`, for others to share; what is named already stays so."""
        for block, key in zip(self._tables[owner], keys, strict=False):
            if block not in self._key_of and key not in self._block_of:
                self._key_of[block] = key
                self._block_of[key] = block

    def forget(self, owner: Hashable) -> None:
        """Let nobody else share the blocks of `owner`, if it holds any: what is in them cannot be trusted."""
        for block in self._tables.get(owner, []):
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]

    def table(self, owner: Hashable) -> list[int]:
        """The blocks of `owner`, in the order of its tokens."""
        return self._tables[owner]

    def free(self, owner: Hashable) -> None:
        """Take back what `owner` holds, if anything."""
        # The last first: a prefix is worth more than what follows it.
        for block in reversed(self._tables.pop(owner, [])):
            self._references[block] -= 1
            if self._references[block]:
                continue
            del self._references[block]
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free[block] = None

    def grow(self, num_blocks: int) -> None:
        """Lend blocks up to `num_blocks` from now on."""
        if num_blocks < self.num_blocks:
            raise ValueError(f"block manager: cannot shrink from {self.num_blocks} to {num_blocks} blocks")
        self._free.update(dict.fromkeys(reversed(range(self.num_blocks, num_blocks))))
        self.num_blocks = num_blocks
        self.limit = max(self.limit, num_blocks)

    def give_up(self, num_blocks: int) -> list[Hashable]:
        """Do with `num_blocks` blocks, there being no memory for more. Returns the owners who have lost theirs."""
        losers = [owner for owner, table in self._tables.items() if max(table, default=-1) >= num_blocks]
        for owner in losers:
            self.free(owner)
        for block in [block for block in self._idle if block >= num_blocks]:
            self._evict(block)
        self._free = {block: None for block in self._free if block < num_blocks}
        self.num_blocks = self.limit = num_blocks
        return losers

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every block has one state, and as many references as tables hold it."""
        counted: dict[int, int] = {}
        for table in self._tables.values():
            assert len(set(table)) == len(table), "a block stands twice in one table"
            for block in table:
                counted[block] = counted.get(block, 0) + 1
        assert counted == self._references, "references and tables differ"
        states = sorted([*self._free, *self._idle, *self._references])
        assert states == list(range(self.num_blocks)), "a block is lost or in two states"
        assert self._block_of == {key: block for block, key in self._key_of.items()}, "keys and blocks differ"
        assert not self._free.keys() & self._key_of.keys(), "a free block has a key"
        assert set(self._idle) <= set(self._key_of), "an idle block has no key"

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._references[block] = self._references.get(block, 0) + 1

    def _evict(self, block: int) -> None:
        del self._idle[block]
        del self._block_of[self._key_of.pop(block)]
        self._free[block] = None
        self.num_evicted += 1

    def _take(self, count: int, after: int | None = None) -> list[int]:
        """`count` new blocks with a reference each, where `available` says there are so many."""
        while len(self._free) < count and self._idle:
            self._evict(next(iter(self._idle)))
        if len(self._free) < count:
            # Twice as many as far as allowed, so that what is copied along stays in proportion.
            self.grow(max(self.num_blocks + count - len(self._free), min(2 * self.num_blocks, self.limit)))
        if after is not None and count == 1 and after + 1 in self._free:
            del self._free[after + 1]  # neighbours are read together
            blocks = [after + 1]
        else:
            blocks = [self._free.popitem()[0] for _ in range(count)]
        self._references.update(dict.fromkeys(blocks, 1))
        return blocks
