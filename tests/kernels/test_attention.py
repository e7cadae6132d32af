import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.attention import (
    causal_attention,
    causal_attention_reference,
    tile_attention,
    tile_attention_reference,
)

from .measure import FP32_BOUND, check_gradients, random, relative_error


def exact_tile_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v)


def exact_causal_attention(q: Tensor, k: Tensor, v: Tensor, context_lens: list[int] | None = None) -> Tensor:
    """Query by query: the t-th of T queries of a row with n keys sees the first n - T + t + 1."""
    batch, tokens, heads, head_dim = q.shape
    kv_head = [head // (heads // k.shape[1]) for head in range(heads)]
    rows = []
    for row in range(batch):
        length = k.shape[2] if context_lens is None else context_lens[row]
        keys, values = k[row, kv_head], v[row, kv_head]
        steps = []
        for t in range(tokens):
            seen = length - tokens + t + 1
            weights = (torch.einsum("hd,hkd->hk", q[row, t], keys[:, :seen]) / head_dim**0.5).softmax(-1)
            steps.append(torch.einsum("hk,hkd->hd", weights, values[:, :seen]))
        rows.append(torch.stack(steps))
    return torch.stack(rows)


def inputs(batch: int, tokens: int, heads: int, kv_heads: int, context: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    cache = (batch, kv_heads, context, d)
    return random(batch, tokens, heads, d), random(*cache, seed=1), random(*cache, seed=2)


# Tiny, odd, and a tile of InternViT-300M.
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 5, 7, 6), (1, 1025, 16, 64)])
def test_tile_attention_reference_is_the_formula(shape: tuple[int, ...]) -> None:
    q, k, v = random(*shape), random(*shape, seed=1), random(*shape, seed=2)
    exact = exact_tile_attention(q.double(), k.double(), v.double())
    assert relative_error(tile_attention_reference(q, k, v), exact) < FP32_BOUND


def test_tile_attention_takes_strided_views_of_one_projection() -> None:
    q, k, v = (part.view(2, 5, 3, 8) for part in random(2, 5, 3 * 24).chunk(3, dim=-1))
    packed = tile_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert relative_error(tile_attention(q, k, v), packed.double()) < FP32_BOUND


def test_tiles_do_not_see_each_other() -> None:
    q, k, v = (random(4, 9, 2, 8, seed=seed) for seed in range(3))
    alone = torch.cat([tile_attention(q[n : n + 1], k[n : n + 1], v[n : n + 1]) for n in range(4)])
    assert relative_error(tile_attention(q, k, v), alone.double()) < FP32_BOUND


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 6),
    earlier=st.integers(0, 6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    d=st.sampled_from([2, 6, 16]),
)
def test_causal_attention_reference_is_the_formula_for_prompts_chunks_and_single_tokens(
    batch: int, tokens: int, earlier: int, kv_heads: int, group: int, d: int
) -> None:
    q, k, v = inputs(batch, tokens, kv_heads * group, kv_heads, earlier + tokens, d)
    exact = exact_causal_attention(q.double(), k.double(), v.double())
    assert relative_error(causal_attention_reference(q, k, v), exact) < FP32_BOUND


@settings(max_examples=40)
@given(data=st.data(), tokens=st.integers(1, 4), kv_heads=st.integers(1, 3), group=st.integers(1, 3))
def test_rows_of_different_lengths_see_only_their_own_keys(
    data: st.DataObject, tokens: int, kv_heads: int, group: int
) -> None:
    context = 9
    lens = data.draw(st.lists(st.integers(tokens, context), min_size=1, max_size=4))
    q, k, v = inputs(len(lens), tokens, kv_heads * group, kv_heads, context, 6)
    for row, length in enumerate(lens):  # what lies behind a row's end must not count, whatever it is
        k[row, :, length:] = 1e4
        v[row, :, length:] = 1e4
    exact = exact_causal_attention(q.double(), k.double(), v.double(), lens)
    assert relative_error(causal_attention_reference(q, k, v, torch.tensor(lens)), exact) < FP32_BOUND


# InternLM2-20B: 48 query and 8 KV heads of 128; Qwen2-0.5B: 14 and 2 of 64.
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(48, 8, 128), (14, 2, 64)])
@pytest.mark.parametrize(("tokens", "context"), [(48, 48), (1, 2000), (8, 300)], ids=["prompt", "decode", "chunk"])
def test_causal_attention_reference_at_real_head_sizes(
    heads: int, kv_heads: int, d: int, tokens: int, context: int
) -> None:
    q, k, v = inputs(1, tokens, heads, kv_heads, context, d)
    exact = exact_causal_attention(q.double(), k.double(), v.double())
    assert relative_error(causal_attention_reference(q, k, v), exact) < FP32_BOUND


def test_full_context_lens_mean_the_same_as_none() -> None:
    for tokens in (1, 3, 8):
        q, k, v = inputs(2, tokens, 4, 2, 8, 6)
        given_lens = causal_attention(q, k, v, torch.tensor([8, 8]))
        assert relative_error(causal_attention(q, k, v), given_lens.double()) < FP32_BOUND


def test_on_the_cpu_the_launchers_are_the_references() -> None:
    q, k, v = inputs(2, 3, 4, 2, 5, 6)
    assert torch.equal(causal_attention(q, k, v), causal_attention_reference(q, k, v))
    q, k, v = (random(2, 5, 3, 8, seed=seed) for seed in range(3))
    assert torch.equal(tile_attention(q, k, v), tile_attention_reference(q, k, v))


def test_gradients_flow_to_queries_keys_and_values() -> None:
    check_gradients(tile_attention, exact_tile_attention, *(random(2, 5, 3, 8, seed=seed) for seed in range(3)))
    for tokens in (1, 3, 5):
        check_gradients(causal_attention, exact_causal_attention, *inputs(2, tokens, 4, 2, 5, 6))


def test_shapes_that_do_not_fit_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match=r"tile_attention: q \(1, 2, 3, 4\), k \(1, 2, 3, 5\)"):
        tile_attention(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"causal_attention: q \(1, 2, 3, 4\) does not fit k \(1, 2, 5, 4\)"):
        causal_attention(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
    with pytest.raises(ValueError, match="does not fit"):
        causal_attention(torch.zeros(1, 6, 4, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
