"""Runs the two halves of a model: tiles to visual tokens, prompts and decode steps to logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.dispatch import cuda_target
from ..layers.kv_cache import KVBatch, KVCache
from ..models.internvl import InternVLModel
from .graphs import TILE_COUNTS, CudaCapture, DecodeGraphs, VisionGraphs

# Tiles in one pass of the vision half: enough to fill the matrix products, few enough to bound its activations.
TILES_PER_BATCH = 16


class Runner:
    """A model with its KV cache on one device; on CUDA, without `enforce_eager`, replaying graphs.

    `max_num_seqs` and `max_model_len` bound the decode graphs.
    """

    def __init__(self, model: InternVLModel, *, max_num_seqs: int, max_model_len: int, enforce_eager: bool) -> None:
        self.model = model
        self.config = model.config
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        # Plain torch, which older GPUs run, asks the host for numbers, and that cannot be captured.
        graphed = self.device.type == "cuda" and not enforce_eager and cuda_target(self.device) is not None
        self.capture = CudaCapture(self.device) if graphed else None
        self.cache: KVCache | None = None
        self._vision: VisionGraphs | None = None
        self._decode: DecodeGraphs | None = None

    @torch.inference_mode()
    def warm_up_vision(self) -> None:
        """Take the memory that the vision half needs at most, before any is given to keys and values."""
        if self.device.type != "cuda":
            return
        size = self.config.tile_size
        if self.capture is not None:
            max_tiles = max(TILE_COUNTS)
            self._vision = VisionGraphs(self.model.encode_tiles, size, max_tiles, self.capture, self.device)
        else:
            shape = (TILES_PER_BATCH, size, size, 3)
            self.model.encode_tiles(torch.zeros(shape, dtype=torch.uint8, device=self.device))

    @torch.inference_mode()
    def encode(self, tiles: Tensor) -> Tensor:
        """tiles: (n, tile_size, tile_size, 3) uint8 on the CPU. Returns (n, tokens_per_tile, llm hidden)."""
        if self._vision is not None:
            return torch.cat([self._vision(part) for part in tiles.split(max(TILE_COUNTS))])
        return torch.cat([self.model.encode_tiles(part.to(self.device)) for part in tiles.split(TILES_PER_BATCH)])

    @torch.inference_mode()
    def allocate(self, num_blocks: int, *, keep: bool) -> None:
        """Make the cache hold `num_blocks` blocks and `keep` what is in it, or else free that first."""
        self._decode = None  # graphs read and write the cache that they were captured with
        if not keep:
            self.cache = None
        grown = KVCache(self.config.llm, num_blocks, dtype=self.dtype, device=self.device)
        if self.cache is not None:
            grown.copy_from(self.cache)
        self.cache = grown
        if self.capture is not None:
            self._decode = DecodeGraphs(
                self._step,
                grown,
                max_num_seqs=self.max_num_seqs,
                max_blocks=-(-self.max_model_len // grown.block_size),
                rotary_dim=self.config.llm.head_dim,
                capture=self.capture,
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
        """Run one prompt into the blocks of `table`. Returns the logits (1, vocab) of its last token.

        visual_tokens: (visual, hidden) for the places that hold `context_id`; inv_freq: (head_dim / 2,).
        """
        assert self.cache is not None
        decoder = self.model.language_model
        ids = torch.tensor(token_ids, device=self.device)
        x = decoder.embed(ids) if visual_tokens is None else self.model.splice(ids, visual_tokens, context_id)
        length = len(token_ids)
        kv = KVBatch.of(self.cache, [table], [length], [length])
        return decoder.logits(decoder(x, torch.arange(length, device=self.device), inv_freq, kv)[-1:])

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
        assert self.cache is not None
        kv = KVBatch.of(self.cache, tables, context_lens, [1] * len(token_ids))
        ids = torch.tensor(token_ids, device=self.device)
        run = self._decode if self._decode is not None and len(token_ids) <= self.max_num_seqs else self._step
        return run(ids, kv.context_lens.long() - 1, inv_freq, kv)

    def _step(self, token_ids: Tensor, positions: Tensor, inv_freq: Tensor, kv: KVBatch) -> Tensor:
        decoder = self.model.language_model
        return decoder.logits(decoder(decoder.embed(token_ids), positions, inv_freq, kv))
