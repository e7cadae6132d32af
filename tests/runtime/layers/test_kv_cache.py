import pytest
import torch

from vitrail.kernels.quantized_cache import QuantizedCache
from vitrail.runtime.config import parse_config
from vitrail.runtime.layers.kv_cache import KVBatch, KVCache

from ...random_checkpoints import chat_config

LLM = parse_config(chat_config(llm={"num_hidden_layers": 2, "head_dim": 8})).llm  # 2 KV heads


def cache(num_blocks: int = 5) -> KVCache:
    return KVCache(LLM, num_blocks, 4, dtype=torch.float32, device=torch.device("cpu"))


def test_everything_is_allocated_at_once_and_empty() -> None:
    kv = KVCache(LLM, 3, 16, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert kv.keys.shape == kv.values.shape == (2, 3, 16, 2, 8)
    assert kv.keys.dtype == kv.values.dtype == torch.bfloat16
    assert (kv.num_blocks, kv.block_size) == (3, 16)
    assert not kv.keys.any()
    assert not kv.values.any()
    assert 3 * 16 * LLM.kv_bytes_per_token == kv.keys.nbytes + kv.values.nbytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_caches_of_8_bits_have_a_scale_for_each_token_and_head(device: str) -> None:
    kv = KVCache(LLM, 3, 16, dtype=torch.int8, device=torch.device(device))
    for cache in (kv.keys, kv.values):
        assert isinstance(cache, QuantizedCache)
        assert (cache.codes.shape, cache.codes.dtype) == ((2, 3, 16, 2, 8), torch.int8)
        assert (cache.scales.shape, cache.scales.dtype) == ((2, 3, 16, 2), torch.float32)
    assert (kv.num_blocks, kv.block_size) == (3, 16)
    assert 3 * KVCache.bytes_per_block(LLM, torch.int8, 16) == kv.keys.nbytes + kv.values.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_block_takes_what_its_tokens_take(dtype: torch.dtype) -> None:
    assert KVCache.bytes_per_block(LLM, dtype, 16) == 16 * LLM.kv_bytes_per_token * dtype.itemsize // 2


def test_codes_and_scales_are_copied_together() -> None:
    old, new = (KVCache(LLM, blocks, 4, dtype=torch.int8, device=torch.device("cpu")) for blocks in (3, 5))
    assert isinstance(old.keys, QuantizedCache)
    old.keys.codes.random_(-127, 128)
    old.keys.scales.normal_()
    new.copy_from(old)
    new.copy_blocks([2], [4])
    assert isinstance(new.keys, QuantizedCache)
    for held, before in ((new.keys.codes, old.keys.codes), (new.keys.scales, old.keys.scales)):
        assert torch.equal(held[:, :3], before)
        assert torch.equal(held[:, 4], before[:, 2])
        assert not held[:, 3].any()


def test_blocks_are_copied_over_others_and_nothing_else_changes() -> None:
    kv = cache()
    kv.keys.normal_()
    kv.values.normal_()
    keys, values = kv.keys.clone(), kv.values.clone()
    kv.copy_blocks([4, 0], [1, 2])
    for held, before in ((kv.keys, keys), (kv.values, values)):
        assert torch.equal(held[:, [1, 2]], before[:, [4, 0]])
        assert torch.equal(held[:, [0, 3, 4]], before[:, [0, 3, 4]])


def test_a_cache_takes_over_the_blocks_of_a_smaller_one() -> None:
    old, new = cache(3), cache(5)
    old.keys.normal_()
    old.values.normal_()
    new.copy_from(old)
    assert torch.equal(new.keys[:, :3], old.keys)
    assert torch.equal(new.values[:, :3], old.values)
    assert not new.keys[:, 3:].any()


def test_new_tokens_go_to_the_slots_at_the_end_of_each_context() -> None:
    batch = KVBatch.of(cache(), [[3, 1], [2], [4, 0]], [6, 3, 5], [6, 1, 2])
    assert batch.slot_mapping.tolist() == [12, 13, 14, 15, 4, 5, 10, 19, 0]
    assert batch.slot_mapping.dtype == torch.int64
    assert batch.block_tables.tolist() == [[3, 1], [2, 0], [4, 0]]
    assert batch.cu_seqlens_q.tolist() == [0, 6, 7, 9]
    assert batch.context_lens.tolist() == [6, 3, 5]
    assert batch.max_seqlen_q == 6
    assert {t.dtype for t in (batch.block_tables, batch.cu_seqlens_q, batch.context_lens)} == {torch.int32}


def test_a_table_too_short_for_its_context_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="1 new tokens of 9 do not fit a table of 2 blocks of 4"):
        KVBatch.of(cache(), [[0, 1]], [9], [1])
    with pytest.raises(ValueError, match="3 new tokens of 2 do not fit"):
        KVBatch.of(cache(), [[0]], [2], [3])
