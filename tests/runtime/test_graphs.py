"""Composition, padding and buffers of graphs, with captures that simply run again; what CUDA adds is tested there."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitrail.runtime.engine.graphs import TILE_COUNTS, CudaCapture, DecodeGraphs, VisionGraphs, compose
from vitrail.runtime.engine.runner import Runner
from vitrail.runtime.layers.kv_cache import KVBatch, KVCache
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.internvl import InternVLModel

from ..random_checkpoints import build, chat_config, random_weights

CPU = torch.device("cpu")


class Rerun:
    """Captures as CUDA does: the function writes the same result tensor at every replay, and runs at none else."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        result = run().clone()

        def replay() -> Tensor:
            self.runs += 1
            result.copy_(run())
            return result

        return replay


def tiny() -> InternVLModel:
    config = chat_config()
    return build(config, random_weights(config), torch.float32)


@given(st.integers(1, 64))
def test_captured_counts_add_up_to_any_number_of_tiles(num_tiles: int) -> None:
    parts = compose(num_tiles)
    assert sum(parts) == num_tiles
    assert set(parts) <= set(TILE_COUNTS)
    assert list(parts) == sorted(parts, reverse=True)


@pytest.mark.parametrize(
    ("num_tiles", "parts"), [(13, (13,)), (12, (8, 4)), (3, (2, 1)), (14, (13, 1)), (64, (32, 32))]
)
def test_tiles_are_composed_so_that_the_least_is_lost(num_tiles: int, parts: tuple[int, ...]) -> None:
    assert compose(num_tiles) == parts


@pytest.mark.parametrize("num_tiles", [1, 3, 5, 8, 11])
@torch.no_grad()
def test_vision_graphs_give_what_the_model_gives(num_tiles: int) -> None:
    model, capture = tiny(), Rerun()
    size = model.config.tile_size
    graphs = VisionGraphs(model.encode_tiles, size, 4, capture, CPU)
    tiles = torch.randint(0, 256, (num_tiles, size, size, 3), dtype=torch.uint8)
    result, expected = graphs(tiles), model.encode_tiles(tiles)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    assert capture.runs == len(compose(num_tiles, (1, 2, 4)))


@torch.no_grad()
def test_decode_graphs_pad_a_batch_without_touching_another_sequence() -> None:
    model = tiny()
    decoder, llm = model.language_model, model.config.llm
    runner = Runner(model, max_num_seqs=6, max_model_len=32, enforce_eager=True)
    capture = Rerun()
    lengths, tables = [5, 9, 2], [[0, 1], [2, 3], [4, 5]]
    inv_freq = inverse_frequencies(llm, 16)
    caches = [KVCache(llm, 8, 8, dtype=torch.float32, device=CPU) for _ in range(2)]
    for cache in caches:
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        ids = torch.arange(sum(lengths)) + 3
        positions = torch.cat([torch.arange(length) for length in lengths])
        decoder(decoder.embed(ids), positions, inv_freq, KVBatch.of(cache, tables, lengths, lengths))
    graphs = DecodeGraphs(
        runner._step, caches[0], max_num_seqs=6, max_blocks=4, rotary_dim=llm.head_dim, capture=capture
    )
    assert graphs.sizes == (1, 2, 4, 6)
    for rows in ([0, 1, 2], [1], [2, 0], [0, 1, 2]):  # a smaller batch after a larger one leaves rows behind
        for row in rows:
            lengths[row] += 1
        contexts = [lengths[row] for row in rows]
        results = []
        for cache, step in zip(caches, (graphs, runner._step), strict=True):
            kv = KVBatch.of(cache, [tables[row] for row in rows], contexts, [1] * len(rows))
            ids = torch.tensor(rows) + 7
            results.append(step(ids, kv.context_lens.long() - 1, inv_freq.expand(len(rows), -1), kv).clone())
        torch.testing.assert_close(*results, rtol=0, atol=2e-6 * results[1].abs().max().item())
    # Nothing but the sequences' own slots was written: both caches hold the same, NaN where nobody wrote.
    torch.testing.assert_close(caches[0].keys, caches[1].keys, equal_nan=True)
    torch.testing.assert_close(caches[0].values, caches[1].values, equal_nan=True)


@pytest.mark.gpu
@torch.inference_mode()
def test_captured_graphs_give_what_the_model_gives_and_count_their_memory() -> None:
    model = tiny().to("cuda", torch.bfloat16)
    device = torch.device("cuda")
    capture = CudaCapture(device)
    size = model.config.tile_size
    graphs = VisionGraphs(model.encode_tiles, size, 8, capture, device)
    for num_tiles in (1, 7, 11, 1):
        tiles = torch.randint(0, 256, (num_tiles, size, size, 3), dtype=torch.uint8)
        expected = torch.cat(
            [model.encode_tiles(part.cuda()) for part in tiles.split(list(compose(num_tiles, graphs.counts)))]
        )
        assert torch.equal(graphs(tiles), expected)
    assert capture.num_bytes > 0
