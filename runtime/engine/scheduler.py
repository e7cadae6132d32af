"""Who runs in the next step: one policy for both halves. Plain Python: no torch, no clock, no I/O.

Every step runs one token of each sequence that decodes, and beside them as much prompt and as many tiles as a budget
allows; a tile counts as the visual tokens it becomes. While something decodes the budget is `CHUNK_TOKENS`, so that
the wait between two tokens of an answer is bounded whatever arrives.
Requests are served in the order of their arrival. Blocks are lent as tokens come; when none is left, the request that
came last gives its own back and runs again later, its tokens known (preemption by recompute).

Where the vision half has devices of its own, tiles cost a step nothing. They are sent as soon as it has room for them,
those of running requests first, and chunks of prompts wait for what comes back.
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
_UNBOUNDED = 2**62


def _arrival(request: RequestState) -> int:
    return request.arrival


def _only_decodes(batch: Batch[R]) -> bool:
    return bool(batch.chunks) and all(chunk.decodes for chunk in batch.chunks)


class Scheduler(Generic[R]):
    """Requests that wait and requests that run, both in the order of their arrival.

    exact: every pass is of a shape that the request alone decides. Chunks end at multiples of `chunk_tokens` and are
    shared whole or not at all, and nothing is preempted: room for the longest answer is counted at admission.
    chunk_tokens: the budget of a step in which others decode.
    tiles_in_flight: how many tiles the vision half's own devices hold at once; `arrived` says what has come back.
    None: the halves share a device.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int = 8192,
        enable_prefix_caching: bool = True,
        exact: bool = False,
        chunk_tokens: int = CHUNK_TOKENS,
        tiles_in_flight: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.exact = exact
        self.tiles_in_flight = tiles_in_flight
        size = blocks.block_size
        self._budget_beside = min(chunk_tokens, max_num_batched_tokens)
        self.chunk_tokens = max(size, self._budget_beside // size * size)
        self.waiting: list[R] = []
        self.running: list[R] = []
        self._in_flight: dict[Tiles[R], bool] = {}  # in the order they were sent; whether their request wants them yet

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    @property
    def num_rows(self) -> int:
        """Rows that running requests take or will take."""
        return sum(request.num_rows for request in self.running)

    @property
    def num_in_flight(self) -> int:
        """Tiles that were sent and have not come back, wanted or not."""
        return sum(tiles.count for tiles in self._in_flight)

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
        self._give_up_tiles(request)

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
                image.num_sent = image.num_encoded = 0
        self._give_up_tiles(request)
        self.running.remove(request)
        self.add(request)

    def arrived(self, tiles: Tiles[R]) -> bool:
        """Note that tiles have come back, as tokens or not. Returns whether anybody still waits for these very ones."""
        wanted = self._in_flight.pop(tiles)
        if wanted:
            image = tiles.request.images[tiles.place]
            # Devices overtake one another: tokens behind a gap are not counted before it is closed.
            image.num_encoded = min(
                (other.first for other in self._on_the_way(tiles.request) if other.place == tiles.place),
                default=image.num_sent,
            )
        return wanted

    def _on_the_way(self, request: R) -> list[Tiles[R]]:
        return [tiles for tiles, wanted in self._in_flight.items() if wanted and tiles.request is request]

    def _give_up_tiles(self, request: R) -> None:
        """What is on its way for a request will be ignored; until it comes it takes room."""
        for tiles in self._on_the_way(request):
            self._in_flight[tiles] = False

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
        left = self._prefill_all(batch)
        if self.tiles_in_flight is not None:
            left = _UNBOUNDED
            for request in self.running:
                start = min((sequence.num_computed for sequence in request.live), default=0)
                self._encode(request, start, batch, left, whole=False)
        if left > 0:
            self._encode_ahead(batch, left)
        return batch

    def _prefill_all(self, batch: Batch[R]) -> int:
        """Prompts, and tiles on the way to them, beside those who decode. Returns what is left of the step's budget."""
        left = budget = self._budget_beside if batch.chunks else self.max_num_batched_tokens
        decoding = {request.sequences[chunk.index] for chunk in batch.chunks for request in (chunk.request,)}
        for request in chain(list(self.running), self._admitted()):
            pending = [sequence for sequence in request.live if sequence not in decoding]
            if pending:
                left = self._prefill(request, pending, batch, left, whole=left == budget)
            if left <= 0:
                break
        return left

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
        if self.tiles_in_flight is None:
            start = min(sequence.num_computed for sequence in pending)
            left = self._encode(request, start, batch, left, whole=whole)
            whole = whole and not batch.tiles
        for sequence in pending:
            start, length = sequence.num_computed, request.length(sequence)
            end = min(length, self._available(request.images, start))
            if self.exact:
                border = min(length, (start // self.chunk_tokens + 1) * self.chunk_tokens)
                end = border if border <= end and (whole or border - start <= left) else start
            elif self.tiles_in_flight is not None and end < min(length, start + left) and _only_decodes(batch):
                end = start  # more is on its way: it is not worth a pass that others have to wait for
            else:
                end = min(end, start + left)
            if end > start:
                batch.chunks.append(Chunk(request, sequence.index, start, end, samples=end == length))
                left -= end - start
                whole = False
        return left

    def _encode(self, request: R, start: int, batch: Batch[R], left: int, *, whole: bool) -> int:
        """Tiles of the images that stand behind `start`; one at least if the `whole` budget is there.

        Returns what is left of the budget.
        """
        for place, image in enumerate(request.images):
            if image.end <= start or not image.num_unsent:
                continue
            count = min(image.num_unsent, max(left // image.tokens_per_tile, int(whole)))
            if self.tiles_in_flight is not None:
                count = min(count, self.tiles_in_flight - self.num_in_flight)
            if count <= 0:
                break
            self._send(Tiles(request, place, image.num_sent, count), batch)
            left -= count * image.tokens_per_tile
            whole = False
        return left

    def _send(self, tiles: Tiles[R], batch: Batch[R]) -> None:
        image = tiles.request.images[tiles.place]
        image.num_sent += tiles.count
        if self.tiles_in_flight is None:
            image.num_encoded = image.num_sent
            batch.tiles.append(tiles)
            return
        for first in range(tiles.first, image.num_sent):  # each by itself, for each comes back by itself
            one = Tiles(tiles.request, tiles.place, first, 1)
            self._in_flight[one] = True
            batch.tiles.append(one)

    def _encode_ahead(self, batch: Batch[R], left: int) -> None:
        """Tiles of requests that still wait, so that they begin at once when there is room: a bounded number."""
        ahead = self.max_num_batched_tokens - sum(
            image.num_sent * image.tokens_per_tile for request in self.waiting for image in request.images
        )
        for request in self.waiting:
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
        return max(start, min(missing)) if missing else _UNBOUNDED

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
        self._check_tiles()

    def _check_tiles(self) -> None:
        assert self.num_in_flight <= (self.tiles_in_flight or 0), "more tiles in flight than there is room for"
        here = [*self.waiting, *self.running]
        for request in here:
            for place, image in enumerate(request.images):
                away = sorted(tiles.first for tiles in self._on_the_way(request) if tiles.place == place)
                assert 0 <= image.num_sent <= image.num_tiles
                there = away[0] if away else image.num_sent
                assert image.kept or image.num_encoded == there, "tokens that are not there"
        owners = {id(request) for request in here}
        assert all(id(tiles.request) in owners for tiles, wanted in self._in_flight.items() if wanted)
