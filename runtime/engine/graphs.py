"""CUDA graphs of the two halves: the vision half by number of tiles, the decoder's step by number of sequences.

A graph replays its kernels without the host, on the same memory: inputs are copied into buffers that it reads, and
results stay valid until the next replay of a graph from the same `CudaCapture`, since those share their memory and
must never run at the same time. Other sizes are composed of captured ones (tiles) or padded (sequences).
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.kv_cache import KVBatch, KVCache
from .upload import Upload, carve, packed_size

# Tiles of a vision graph with the share of the GPU that its matrix products keep busy on an H200 with 128x128 output
# tiles: what is lost is the last, incomplete wave of thread blocks.
TILE_COUNTS = {1: 0.791, 2: 0.846, 4: 0.921, 7: 0.965, 8: 0.958, 13: 0.986, 16: 0.980, 26: 0.985, 32: 0.992}
BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# A captured function: call it to run again; its result is always the same tensor.
Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


class CudaCapture:
    """Captures functions as CUDA graphs that share one pool of memory. `num_bytes`: what the captures took so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes = 0
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        """A replay of `run`, which must read and write the same tensors every time and never wait for the GPU."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            free, _ = torch.cuda.mem_get_info()
            # Libraries choose their kernels and take their workspaces in the first calls, which must not be captured;
            # workspaces belong to a stream, so that all captures share one.
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = run()
            torch.cuda.synchronize()
            self.num_bytes += max(0, free - torch.cuda.mem_get_info()[0])

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@cache
def compose(num_tiles: int, counts: tuple[int, ...] = tuple(TILE_COUNTS)) -> tuple[int, ...]:
    """Captured tile counts that add up to `num_tiles` in the least time, the largest first."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for total in range(1, num_tiles + 1):
        options = (
            (best[total - count][0] + count / TILE_COUNTS[count], (*best[total - count][1], count))
            for count in counts
            if count <= total
        )
        best.append(min(options))
    return tuple(sorted(best[num_tiles][1], reverse=True))


class VisionGraphs:
    """`encode` (uint8 tiles -> visual tokens) as graphs of up to `max_tiles` tiles."""

    def __init__(
        self, encode: Callable[[Tensor], Tensor], tile_size: int, max_tiles: int, capture: Capture, device: torch.device
    ) -> None:
        self.counts = tuple(count for count in TILE_COUNTS if count <= max_tiles)
        shape = (self.counts[-1], tile_size, tile_size, 3)
        self._tiles = torch.zeros(shape, dtype=torch.uint8, device=device)
        # The largest first: the smaller ones then live in the memory that it left in the pool.
        self._replays = {count: capture(partial(encode, self._tiles[:count])) for count in reversed(self.counts)}

    def __call__(self, tiles: Tensor) -> Tensor:
        """tiles: (n, tile_size, tile_size, 3) uint8, on any device. Returns (n, tokens_per_tile, llm hidden)."""
        parts = []
        for part in tiles.split(list(compose(tiles.shape[0], self.counts))):
            self._tiles[: len(part)].copy_(part, non_blocking=True)
            parts.append(self._replays[len(part)]().clone())
        return torch.cat(parts)


class DecodeGraphs:
    """One decode step, from token ids to logits, as graphs of up to `max_num_seqs` sequences.

    `step` takes token_ids (n,) int64, positions (n,) int64, inv_freq (n, head_dim / 2) and a `KVBatch`. Sequences that
    pad a batch have no context, and write no keys or values. sizes: those of the graphs, the last `max_num_seqs`.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, Tensor, KVBatch], Tensor],
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_blocks: int,
        rotary_dim: int,
        capture: Capture,
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        self.sizes = sizes or (*(size for size in BATCH_SIZES if size < max_num_seqs), max_num_seqs)
        self._max_blocks = max_blocks
        device = cache.keys.device
        self._upload = Upload(device)
        nobody = torch.zeros(0, dtype=torch.int64)
        no_batch = KVBatch(cache, nobody, nobody.int()[:, None], nobody.int(), nobody.int(), max_seqlen_q=1)
        # What graphs read, packed for the size of each, and the frequencies, which are on the device already.
        self._inputs = torch.zeros(packed_size(self._padded(max_num_seqs, nobody, nobody, no_batch)), dtype=torch.uint8)
        self._inputs = self._inputs.to(device)
        self._inv_freq = torch.zeros(max_num_seqs, rotary_dim // 2, device=device)
        cu_seqlens_q = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)

        def capture_size(n: int) -> Replay:
            padding = self._padded(n, nobody, nobody, no_batch)
            self._upload(padding, into=self._inputs)
            token_ids, positions, slots, contexts, tables = carve(self._inputs, padding)
            kv = KVBatch(cache, slots, tables, cu_seqlens_q[: n + 1], contexts, max_seqlen_q=1)
            return capture(lambda: step(token_ids, positions, self._inv_freq[:n], kv))

        self._replays = {size: capture_size(size) for size in reversed(self.sizes)}

    def _padded(self, size: int, token_ids: Tensor, positions: Tensor, kv: KVBatch) -> list[Tensor]:
        """What a graph of `size` sequences reads, and its sequences behind the given ones."""
        rows = (0, size - len(token_ids))
        return [
            F.pad(token_ids, rows),
            F.pad(positions, rows),
            F.pad(kv.slot_mapping, rows, value=-1),
            F.pad(kv.context_lens, rows),
            F.pad(kv.block_tables, (0, self._max_blocks - kv.block_tables.shape[1], *rows)),
        ]

    def __call__(self, token_ids: Tensor, positions: Tensor, inv_freq: Tensor, kv: KVBatch) -> Tensor:
        """Logits (n, vocab) of one step, valid until the next replay. All but `inv_freq` is on the CPU."""
        count = len(token_ids)
        size = self.sizes[bisect_left(self.sizes, count)]
        self._upload(self._padded(size, token_ids, positions, kv), into=self._inputs)
        self._inv_freq[:count].copy_(inv_freq, non_blocking=True)
        return self._replays[size]()[:count]
