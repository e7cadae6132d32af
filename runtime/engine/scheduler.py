"""Who runs in the next step: one policy for both halves. Plain Python: no torch, no clock, no I/O.

Every step runs one token of each sequence that decodes, and beside them as much prompt and as many tiles as a budget
allows; a tile counts as the visual tokens it becomes. While something decodes the budget is `CHUNK_TOKENS`, so that
the wait between two tokens of an answer is bounded whatever arrives.
Requests are served in the order of their arrival. Blocks are lent as tokens come; when none is left, the request that
came last gives its own back and runs again later, its tokens known (preemption by recompute).
"""

from bisect import insort
from collections.abc import Iterator
from itertools import chain
from typing import Generic

from .batch import Batch, Chunk, Image, R, RequestState, SequenceState, Tiles
from .block_manager import BlockManager, block_key

# Prompt tokens, or tiles counted as their visual tokens, in a step in which others decode. On an A100 two tiles of
# InternViT-6B take 98 ms, 512 tokens of InternLM2-20B 76 ms, and a decode step of 47 sequences 35 ms.
CHUNK_TOKENS = 512


def _arrival(request: RequestState) -> int:
    return request.arrival


class Scheduler(Generic[R]):
    """Requests that wait and requests that run, both in the order of their arrival.

    exact: every pass is of a shape that the request alone decides. Chunks end at multiples of `chunk_tokens` and are
    shared whole or not at all, and nothing is preempted: room for the longest answer is counted at admission.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int = 8192,
        enable_prefix_caching: bool = True,
        exact: bool = False,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.exact = exact
        size = blocks.block_size
        self.chunk_tokens = max(size, min(CHUNK_TOKENS, max_num_batched_tokens) // size * size)
        self.waiting: list[R] = []
        self.running: list[R] = []

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    @property
    def num_rows(self) -> int:
        """Rows that running requests take or will take."""
        return sum(request.num_rows for request in self.running)

    # --- what happens to requests ---

    def add(self, request: R) -> None:
        """Queue a request."""
        insort(self.waiting, request, key=_arrival)

    def remove(self, request: R) -> None:
        """Let go of a request, wherever it is, and of its blocks."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        for sequence in request.sequences:
            self.blocks.free(sequence)

    def finish(self, sequence: SequenceState) -> None:
        """Take back the blocks of a sequence that is done; its request may have others."""
        self.blocks.free(sequence)

    def preempt(self, request: R) -> None:
        """Take a running request's blocks; it waits, in the order of its arrival, to run again what was in them."""
        for sequence in request.sequences:
            self.blocks.free(sequence)
            sequence.num_computed = 0
        for image in request.images:
            if not image.kept:
                image.num_encoded = 0
        self.running.remove(request)
        self.add(request)

    def update(self, chunk: Chunk[R]) -> None:
        """Note that a chunk has been run: its full blocks can be shared, and after the prompt its rows part."""
        request, sequence = chunk.request, chunk.request.sequences[chunk.index]
        sequence.num_computed = chunk.end
        if self.enable_prefix_caching and not (self.exact and (chunk.decodes or chunk.end % self.chunk_tokens)):
            self.blocks.publish(sequence, self._keys(request, sequence, chunk.end))
        if chunk.samples and not request.started:
            request.started = True
            for other in request.sequences:
                if other is not sequence:
                    self.blocks.fork(sequence, other)
                    other.num_computed = chunk.end
                    other.block_keys = list(sequence.block_keys)

    # --- the next step ---

    def schedule(self) -> Batch[R]:
        """What to run next; empty if nothing can."""
        batch: Batch[R] = Batch()
        self._decode(batch)
        budget = self.max_num_batched_tokens
        if batch.chunks:
            budget = min(budget, CHUNK_TOKENS)
        left = budget
        decoding = {request.sequences[chunk.index] for chunk in batch.chunks for request in (chunk.request,)}
        for request in chain(list(self.running), self._admitted()):
            pending = [sequence for sequence in request.live if sequence not in decoding]
            if pending:
                left = self._prefill(request, pending, batch, left, whole=left == budget)
            if left <= 0:
                return batch
        self._encode_ahead(batch, left)
        return batch

    def _decode(self, batch: Batch[R]) -> None:
        """One token of every sequence that has one to run, the requests that came last making room where it must be."""
        for request in list(self.running):
            for sequence in request.live if request.started else []:
                length = request.length(sequence)
                if length - sequence.num_computed != 1:
                    continue
                copies = self._make_room(request, sequence, length, batch)
                if copies is None:
                    break
                batch.copies += copies
                batch.chunks.append(Chunk(request, sequence.index, length - 1, length, samples=True, decodes=True))

    def _make_room(
        self, request: R, sequence: SequenceState, length: int, batch: Batch[R]
    ) -> list[tuple[int, int]] | None:
        """Room for a sequence's last token: what has to be copied for it, or None if its own request was preempted."""
        while request in self.running:
            copies = self.blocks.reserve(sequence, length)
            if copies is not None:
                return copies
            victim = self.running[-1]
            self.preempt(victim)
            batch.preempted.append(victim)
            batch.chunks = [chunk for chunk in batch.chunks if chunk.request is not victim]
        return None

    def _admitted(self) -> Iterator[R]:
        """Waiting requests that find room, in order, each admitted as it is asked for."""
        while self.waiting and self._fits(self.waiting[0]):
            request = self.waiting.pop(0)
            for sequence in request.live:
                shared = self._shared(request, sequence)
                self.blocks.allocate(sequence, request.length(sequence), shared)
                sequence.num_computed = len(shared) * self.blocks.block_size
                if not request.started:
                    request.num_cached_tokens = sequence.num_computed
            insort(self.running, request, key=_arrival)
            yield request

    def _fits(self, request: R) -> bool:
        if not self.running:
            return True  # it was found to fit alone when it came
        if self.num_rows + request.num_rows > self.max_num_seqs:
            return False
        if self.exact:
            planned = sum(one.num_rows * self.blocks.blocks_for(one.planned_length) for one in (*self.running, request))
            return planned <= self.blocks.limit
        needed = sum(
            self.blocks.cost(request.length(sequence), self._shared(request, sequence)) for sequence in request.live
        )
        # A block for every row: or else what is admitted now would be preempted a few tokens later.
        return needed + self.num_rows <= self.blocks.available

    def _prefill(self, request: R, pending: list[SequenceState], batch: Batch[R], left: int, *, whole: bool) -> int:
        """Tiles of one running request and tokens of its `pending` sequences, as far as the budget goes.

        Returns what is left of the budget; whole: all of it is there.
        """
        left = self._encode(request, min(sequence.num_computed for sequence in pending), batch, left, whole=whole)
        whole = whole and not batch.tiles
        for sequence in pending:
            start, length = sequence.num_computed, request.length(sequence)
            end = min(length, self._available(request.images, start))
            if self.exact:
                border = min(length, (start // self.chunk_tokens + 1) * self.chunk_tokens)
                end = border if border <= end and (whole or border - start <= left) else start
            else:
                end = min(end, start + left)
            if end > start:
                batch.chunks.append(Chunk(request, sequence.index, start, end, samples=end == length))
                left -= end - start
                whole = False
        return left

    def _encode(self, request: R, start: int, batch: Batch[R], left: int, *, whole: bool) -> int:
        """Tiles of the images that stand behind `start`; one at least if the `whole` budget is there."""
        for place, image in enumerate(request.images):
            missing = image.num_tiles - image.num_encoded
            if image.end <= start or not missing:
                continue
            count = min(missing, max(left // image.tokens_per_tile, int(whole)))
            if count <= 0:
                break
            batch.tiles.append(Tiles(request, place, image.num_encoded, count))
            image.num_encoded += count
            left -= count * image.tokens_per_tile
            whole = False
        return left

    def _encode_ahead(self, batch: Batch[R], left: int) -> None:
        """Tiles of requests that still wait, so that they begin at once when there is room: a bounded number."""
        ahead = self.max_num_batched_tokens
        for request in self.waiting:
            held = sum(image.available - image.start for image in request.images)
            ahead -= held
            if min(left, ahead) <= 0:
                return
            cached = len(self._shared(request, request.live[0])) * self.blocks.block_size
            after = self._encode(request, cached, batch, min(left, ahead), whole=False)
            spent = min(left, ahead) - after
            left, ahead = left - spent, ahead - spent

    @staticmethod
    def _available(images: list[Image], start: int) -> int:
        """The first position from `start` on whose visual token is not there."""
        missing = [image.available for image in images if image.end > start and image.num_encoded < image.num_tiles]
        return max(start, min(missing)) if missing else 2**62

    # --- shared prefixes ---

    def _shared(self, request: R, sequence: SequenceState) -> list[bytes]:
        """Keys of the blocks that a sequence begins with and that are there; a token at least remains to be run."""
        if not self.enable_prefix_caching:
            return []
        keys = self._keys(request, sequence, request.length(sequence) - 1)
        count = self.blocks.cached(keys)
        if self.exact:
            step = self.chunk_tokens // self.blocks.block_size
            count = count // step * step
        return keys[:count]

    def _keys(self, request: R, sequence: SequenceState, num_tokens: int) -> list[bytes]:
        """Keys of the full blocks of a sequence's first `num_tokens` tokens."""
        size, keys = self.blocks.block_size, sequence.block_keys
        for number in range(len(keys), num_tokens // size):
            start, end = number * size, (number + 1) * size
            shown = [image.key for image in request.images if image.start < end and image.end > start]
            parent = keys[-1] if keys else request.prefix_key
            keys.append(block_key(parent, request.tokens(sequence, start, end), shown))
        return keys[: num_tokens // size]

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every request is in one queue, in order, and blocks are of running ones."""
        self.blocks.check_integrity()
        for queue in (self.waiting, self.running):
            arrivals = [request.arrival for request in queue]
            assert arrivals == sorted(set(arrivals)), "out of order"
        assert not {id(request) for request in self.waiting} & {id(request) for request in self.running}
        assert self.num_rows <= max(self.max_num_seqs, *(request.num_rows for request in self.running), 0)
        owners = set()
        for request in self.running:
            for sequence in request.live:
                owners.add(sequence)
                assert sequence.num_computed <= request.length(sequence)
                table = self.blocks.table(sequence)
                assert len(table) >= self.blocks.blocks_for(sequence.num_computed), "computed tokens without a block"
        assert owners == set(self.blocks._tables), "blocks of a sequence that does not run"
