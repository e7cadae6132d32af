import pytest
import torch
from torch import Tensor

from vitrail.runtime.config import parse_config
from vitrail.runtime.layers.kv_cache import KVCache, KVSlice

from ...random_checkpoints import chat_config

LLM = parse_config(chat_config(llm={"num_hidden_layers": 2, "head_dim": 8})).llm  # 2 KV heads


def cache(rows: int = 3, length: int = 10) -> KVCache:
    return KVCache(LLM, rows, length, dtype=torch.float32, device=torch.device("cpu"))


def noise(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, rows, tokens, 2, 8, generator=torch.Generator().manual_seed(seed))
    return k, v


def test_everything_is_allocated_at_once_and_empty() -> None:
    kv = KVCache(LLM, 3, 10, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert kv.keys.shape == kv.values.shape == (2, 3, 2, 10, 8)
    assert kv.keys.dtype == kv.values.dtype == torch.bfloat16
    assert (kv.rows, kv.length) == (3, 10)
    assert not kv.keys.any()
    assert not kv.values.any()
    assert 3 * 10 * LLM.kv_bytes_per_token == kv.keys.nbytes + kv.values.nbytes


def test_appended_tokens_come_back_behind_the_earlier_ones() -> None:
    kv = cache()
    first_k, first_v = noise(1, 4)
    next_k, next_v = noise(1, 2, seed=1)
    KVSlice(kv, 1, torch.arange(4)[None], 4).append(0, first_k, first_v)
    keys, values = KVSlice(kv, 1, torch.arange(4, 6)[None], 6).append(0, next_k, next_v)
    assert torch.equal(keys, torch.cat((first_k, next_k), dim=1).transpose(1, 2))
    assert torch.equal(values, torch.cat((first_v, next_v), dim=1).transpose(1, 2))


def test_only_the_given_rows_and_layer_are_written() -> None:
    kv = cache()
    k, v = noise(1, 4)
    KVSlice(kv, 1, torch.arange(4)[None], 4).append(1, k, v)
    assert not kv.keys[0].any()
    assert not kv.values[:, [0, 2]].any()
    assert not kv.keys[1, 1, :, 4:].any()
    assert kv.keys[1, 1, :, :4].all()


def test_rows_of_different_lengths_each_write_at_their_own_position() -> None:
    kv = cache()
    lens = torch.tensor([3, 9, 5])
    k, v = noise(3, 1)
    keys, values = KVSlice(kv, 0, lens[:, None] - 1, 9, lens).append(0, k, v)
    assert keys.shape == values.shape == (3, 2, 9, 8)
    for row, length in enumerate(lens.tolist()):
        assert torch.equal(keys[row, :, length - 1], k[row, 0])
        assert torch.equal(values[row, :, length - 1], v[row, 0])
        assert not keys[row, :, : length - 1].any()
        assert not keys[row, :, length:].any()


def test_what_append_returns_is_the_cache_and_no_copy() -> None:
    kv = cache()
    keys, values = KVSlice(kv, 0, torch.arange(4)[None], 4).append(0, *noise(1, 4))
    assert keys.data_ptr() == kv.keys.data_ptr()
    assert values.data_ptr() == kv.values.data_ptr()


def test_a_row_is_copied_over_another_up_to_its_length() -> None:
    kv = cache()
    kv.keys.normal_()
    kv.values.normal_()
    keys, values = kv.keys.clone(), kv.values.clone()
    kv.copy_row(2, 0, 6)
    assert torch.equal(kv.keys[:, 0, :, :6], keys[:, 2, :, :6])
    assert torch.equal(kv.values[:, 0, :, :6], values[:, 2, :, :6])
    assert torch.equal(kv.keys[:, 0, :, 6:], keys[:, 0, :, 6:])
    assert torch.equal(kv.values[:, 1:], values[:, 1:])


def test_a_cleared_row_holds_nothing_and_the_others_what_they_held() -> None:
    kv = cache()
    kv.keys.fill_(torch.nan)
    kv.values.fill_(torch.nan)
    kv.clear_row(1)
    for held in (kv.keys, kv.values):
        assert not held[:, 1].any()
        assert held[:, [0, 2]].isnan().all()


@pytest.mark.parametrize(("rows", "length"), [(5, 16), (3, 10), (2, 4)], ids=["larger", "equal", "smaller"])
def test_a_cache_takes_over_the_rows_of_another(rows: int, length: int) -> None:
    old, new = cache(), cache(rows, length)
    old.keys.normal_()
    old.values.normal_()
    new.copy_from(old, 2)
    common = min(length, 10)
    assert torch.equal(new.keys[:, :2, :, :common], old.keys[:, :2, :, :common])
    assert torch.equal(new.values[:, :2, :, :common], old.values[:, :2, :, :common])
    assert not new.keys[:, 2:].any()
    assert not new.keys[:, :, :, common:].any()


def test_a_context_beyond_the_cache_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="context 11 exceeds the 10 tokens allocated"):
        KVSlice(cache(), 0, torch.arange(11)[None], 11)
