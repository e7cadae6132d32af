"""Runs the two halves of a model: tiles to visual tokens, chunks of prompts and decode steps to logits."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from ...kernels.dispatch import cuda_target
from ..backends.exported import ExportedVisionModel
from ..errors import VitrailError
from ..layers.kv_cache import KVBatch, KVCache
from ..models.internvl import InternVLModel
from .graphs import TILE_COUNTS, Capture, CudaCapture, DecodeGraphs, VisionGraphs
from .upload import Upload, carve

# Tiles in one pass of the vision half: enough to fill the matrix products, few enough to bound its activations.
TILES_PER_BATCH = 16
# Sequences in every decode step of `exact` passes.
EXACT_ROWS = 16
# What there is on a CPU where the system does not tell how much memory is available.
_UNKNOWN_MEMORY = 8 * 2**30


@dataclass
class Encoded:
    """Visual tokens (tokens, hidden) of some tiles, on the device; `began` and `ended`: CUDA events, or seconds."""

    tokens: Tensor
    began: "torch.cuda.Event | float"
    ended: "torch.cuda.Event | float"
    projector_ms: float = 0.0

    @property
    def elapsed_ms(self) -> float:
        """How long the pass took that they come from; on a GPU it is waited for."""
        if isinstance(self.began, float) or isinstance(self.ended, float):
            return (float(self.ended) - float(self.began)) * 1e3  # type: ignore[arg-type]
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended)


@dataclass
class Row:
    """The new tokens of one sequence in a pass, the last of `context` tokens, and the blocks that hold them.

    inv_freq: (head_dim / 2,). visual: visual tokens (tokens, hidden), each with its place among the new tokens.
    """

    token_ids: Sequence[int]
    context: int
    table: Sequence[int]
    inv_freq: Tensor
    visual: list[tuple[int, Tensor]] = field(default_factory=list)


class Runner:
    """A model with its KV cache on one device; on CUDA, without `enforce_eager`, replaying graphs.

    `max_num_seqs` and `max_model_len` bound the decode graphs. cache_dtype: of keys and values, if not the model's.
    exact: tiles go through the vision half one by one, and decode steps are filled up to `EXACT_ROWS` rows, so that a
    row's result does not depend on the others. failure: why it can do nothing any more.
    """

    failure: VitrailError | None = None

    def __init__(
        self,
        model: InternVLModel,
        *,
        max_num_seqs: int,
        max_model_len: int,
        enforce_eager: bool,
        exact: bool = False,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.config = model.config
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.cache_dtype = cache_dtype or self.dtype
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.exact = exact
        # Plain torch, which older GPUs run, asks the host for numbers, and that cannot be captured.
        self._graphed = self.device.type == "cuda" and not enforce_eager and cuda_target(self.device) is not None
        # The halves run at the same time, each on a stream and on memory of its own.
        self.capture = CudaCapture(self.device) if self._graphed else None
        self.vision_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.cache: KVCache | None = None
        # What a GPU is to read in a step is laid out on the host, for a cache without blocks, and sent as a whole.
        self._upload = Upload(self.device) if self.device.type == "cuda" else None
        self._layout: KVCache | None = None
        self._vision: VisionGraphs | None = None
        self._decode: DecodeGraphs | None = None
        self._last_encoded: torch.cuda.Event | None = None
        self.vision_bytes = 0  # what the vision half takes while it runs and gives back

    @torch.inference_mode()
    def warm_up_vision(self) -> None:
        """Take the memory that the vision half needs at most, before any is given to keys and values."""
        if self.device.type != "cuda" or not self.model.part.vision:
            return
        size = self.config.tile_size
        if self._graphed and not isinstance(self.model, ExportedVisionModel):  # which has graphs of its own, or none
            max_tiles = 1 if self.exact else max(TILE_COUNTS)
            capture = CudaCapture(self.device)
            self._vision = VisionGraphs(self.model.encode_tiles, size, max_tiles, capture, self.device)
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            with torch.cuda.stream(self.vision_stream):
                self._encode(torch.zeros((TILES_PER_BATCH, size, size, 3), dtype=torch.uint8))
            torch.cuda.synchronize(self.device)
            self.vision_bytes = torch.cuda.max_memory_allocated(self.device) - before

    @torch.inference_mode()
    def encode(self, tiles: Tensor) -> Tensor:
        """tiles: (n, tile_size, tile_size, 3) uint8 on the CPU. Returns (n, tokens_per_tile, llm hidden)."""
        return self._encode(tiles)

    def _encode(self, tiles: Tensor) -> Tensor:
        if self._vision is not None:
            return torch.cat([self._vision(part) for part in tiles.split(max(self._vision.counts))])
        most = 1 if self.exact else TILES_PER_BATCH
        parts = (part.to(self.device, non_blocking=True) for part in tiles.split(most))
        return torch.cat([self.model.encode_tiles(part) for part in parts])

    @torch.inference_mode()
    def encode_beside(self, tiles: Tensor) -> Encoded:
        """`encode`, all tokens in one row of (n * tokens_per_tile, hidden); on a GPU it runs beside what follows.

        Passes whose rows have visual tokens wait for it.
        """
        stream = self.vision_stream
        if stream is None:
            with _Stopwatch(self.model.projector) as projector:
                began = perf_counter()
                tokens = self.encode(tiles).flatten(0, 1)
                return Encoded(tokens, began, perf_counter(), projector.elapsed_ms)
        began_event, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            stream.record_event(began_event)
            tokens = self.encode(tiles.pin_memory()).flatten(0, 1)  # pinned: the copy does not hold up this thread
            stream.record_event(ended)
        tokens.record_stream(torch.cuda.current_stream(self.device))
        self._last_encoded = ended
        return Encoded(tokens, began_event, ended)

    @property
    def block_bytes(self) -> int:
        """Of keys and values of one block, on this device."""
        return KVCache.bytes_per_block(self.model.language_model.share, self.cache_dtype)

    def spare_bytes(self, gpu_memory_utilization: float) -> int:
        """What keys and values may take of the device: of a GPU the share that is left, half of what a host has."""
        if self.device.type != "cuda":
            return _available_memory() // 2
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()  # what loading and warming up have freed counts as free
        free, total = torch.cuda.mem_get_info(self.device)
        return free - self.vision_bytes - int((1 - gpu_memory_utilization) * total)

    def allocate(self, num_blocks: int, *, keep: bool) -> None:
        """Make the cache hold `num_blocks` blocks and `keep` what is in it, or else free that first."""
        self._install(self._reserve(num_blocks, keep=keep))

    @torch.inference_mode()
    def _reserve(self, num_blocks: int, *, keep: bool) -> KVCache:
        """A cache to take the place of what there is."""
        if not keep:
            self.cache = self._decode = None
        grown = KVCache(self.model.language_model.share, num_blocks, dtype=self.cache_dtype, device=self.device)
        if self.cache is not None:
            grown.copy_from(self.cache)
        return grown

    @torch.inference_mode()
    def _install(self, grown: KVCache) -> None:
        self.cache, self._decode = grown, None  # graphs read and write the cache that they were captured with
        if self._upload is not None:
            share = self.model.language_model.share
            self._layout = KVCache(share, 0, grown.block_size, dtype=self.cache_dtype, device=torch.device("cpu"))
        capture: Capture | None = self.capture
        if capture is None and self.exact:
            capture = _run_again
        if capture is not None:
            self._decode = DecodeGraphs(
                self._step,
                grown,
                max_num_seqs=EXACT_ROWS if self.exact else self.max_num_seqs,
                max_blocks=-(-self.max_model_len // grown.block_size),
                rotary_dim=self.config.llm.head_dim,
                capture=capture,
                sizes=(EXACT_ROWS,) if self.exact else None,
            )

    @torch.inference_mode()
    def prefill(
        self,
        token_ids: Sequence[int],
        visual_tokens: Tensor | None,
        context_id: int,
        inv_freq: Tensor,
        table: list[int],
    ) -> Tensor:
        """Run one prompt by itself into the blocks of `table`. Returns the logits (1, vocab) of its last token.

        visual_tokens: (visual, hidden) for the places that hold `context_id`; inv_freq: (head_dim / 2,).
        """
        visual, used = [], 0
        if visual_tokens is not None:
            for is_place, group in groupby(range(len(token_ids)), lambda place: token_ids[place] == context_id):
                places = list(group)
                if is_place:
                    visual.append((places[0], visual_tokens[used : used + len(places)]))
                    used += len(places)
        return self.forward([Row(token_ids, len(token_ids), table, inv_freq, visual)])

    def await_encoded(self) -> None:
        """What runs on this stream from now on sees the visual tokens of all that `encode_beside` was given."""
        if self._last_encoded is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last_encoded)

    def _laid_out(
        self, tables: Sequence[Sequence[int]], context_lens: Sequence[int], counts: Sequence[int]
    ) -> tuple[KVBatch, torch.device]:
        """A batch for `_sent`, and the device that it and what goes with it are made on."""
        cache = self._layout or self.cache
        assert cache is not None
        return KVBatch.of(cache, tables, context_lens, counts), cache.keys.device

    def _sent(self, kv: KVBatch, *others: Tensor) -> tuple[KVBatch, Sequence[Tensor]]:
        """A batch and other tensors where the model is: on a GPU by one copy."""
        if self._upload is None:
            return kv, others
        assert self.cache is not None
        tensors = (kv.slot_mapping, kv.block_tables, kv.cu_seqlens_q, kv.context_lens, *others)
        slots, tables, borders, contexts, *there = carve(self._upload(tensors), tensors)
        return KVBatch(self.cache, slots, tables, borders, contexts, kv.max_seqlen_q), there

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Run the new tokens of all rows in one pass. Returns the logits (rows, vocab) of the last token of each."""
        counts = [len(row.token_ids) for row in rows]
        starts = [0, *accumulate(counts)]
        kv, device = self._laid_out([row.table for row in rows], [row.context for row in rows], counts)
        ids = [token for row in rows for token in row.token_ids]
        places = [
            place for row, count in zip(rows, counts, strict=True) for place in range(row.context - count, row.context)
        ]
        by_row = [counts, [end - 1 for end in starts[1:]]] if len(rows) > 1 else []
        kv, (token_ids, positions, *of_rows) = self._sent(
            kv, *(torch.tensor(values, device=device) for values in (ids, places, *by_row))
        )
        decoder = self.model.language_model
        if any(row.visual for row in rows):
            self.await_encoded()
        visual = [
            (first + place, tokens) for row, first in zip(rows, starts, strict=False) for place, tokens in row.visual
        ]
        x = decoder.embed(token_ids, visual)
        if not of_rows:
            return decoder.logits(decoder(x, positions, rows[0].inv_freq, kv)[-1:])
        repeats, last = of_rows
        stacked = torch.stack([row.inv_freq for row in rows])
        inv_freq = stacked.repeat_interleave(repeats, dim=0, output_size=len(ids))
        return decoder.logits(decoder(x, positions, inv_freq, kv)[last])

    @torch.inference_mode()
    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy keys and values of whole blocks over others."""
        assert self.cache is not None
        self.cache.copy_blocks(sources, targets)

    @torch.inference_mode()
    def decode(
        self,
        token_ids: Sequence[int],
        context_lens: Sequence[int],
        inv_freq: Tensor,
        tables: Sequence[Sequence[int]],
    ) -> Tensor:
        """One token of every sequence; contexts count it. Returns logits (sequences, vocab), valid until the next step.

        inv_freq: (sequences, head_dim / 2).
        """
        most = EXACT_ROWS if self.exact else len(token_ids)
        if len(token_ids) <= most:
            return self._decode_rows(token_ids, context_lens, inv_freq, tables)
        parts = [slice(first, first + most) for first in range(0, len(token_ids), most)]
        return torch.cat(
            [self._decode_rows(token_ids[p], context_lens[p], inv_freq[p], tables[p]).clone() for p in parts]
        )

    def _decode_rows(
        self,
        token_ids: Sequence[int],
        context_lens: Sequence[int],
        inv_freq: Tensor,
        tables: Sequence[Sequence[int]],
    ) -> Tensor:
        kv, device = self._laid_out(tables, context_lens, [1] * len(token_ids))
        ids, positions = torch.tensor(token_ids, device=device), kv.context_lens.long() - 1
        if self._decode is not None and len(token_ids) <= self._decode.sizes[-1]:
            return self._decode(ids, positions, inv_freq, kv)
        kv, (ids, positions) = self._sent(kv, ids, positions)
        return self._step(ids, positions, inv_freq, kv)

    def _step(self, token_ids: Tensor, positions: Tensor, inv_freq: Tensor, kv: KVBatch) -> Tensor:
        decoder = self.model.language_model
        return decoder.logits(decoder(decoder.embed(token_ids), positions, inv_freq, kv))


def _available_memory() -> int:
    try:
        # Not the free pages alone: a checkpoint that was just read still stands in the page cache.
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else _UNKNOWN_MEMORY


def _run_again(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What stands for a captured graph where there are none."""
    return run


class _Stopwatch:
    """Times the calls of a module within its block, by this thread."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.elapsed_ms = 0.0

    def __enter__(self) -> "_Stopwatch":
        began: list[float] = []

        def start(*_: object) -> None:
            began.append(perf_counter())

        def stop(*_: object) -> None:
            self.elapsed_ms += (perf_counter() - began.pop()) * 1e3 if began else 0.0

        self._hooks = (
            self._module.register_forward_pre_hook(start),
            self._module.register_forward_hook(stop),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
