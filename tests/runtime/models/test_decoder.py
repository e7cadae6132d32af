from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.runtime.layers.kv_cache import KVBatch, KVCache
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.decoder import Decoder

from ...random_checkpoints import ARCHITECTURES, build, chat_config, random_weights

# Different shapes of the same product may sum in another order; a wrong mask or position shows at 1e-2.
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}


def decoder(architecture: str = "InternLM2ForCausalLM", dtype: torch.dtype = torch.float32) -> Decoder:
    config = chat_config(architecture)
    return build(config, random_weights(config), dtype).language_model


def embeddings(model: Decoder, rows: int, tokens: int, seed: int = 0) -> Tensor:
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return model.embed(ids)


def new_cache(model: Decoder, num_blocks: int) -> KVCache:
    return KVCache(model.config, num_blocks, 4, dtype=model.embedding.dtype, device=model.embedding.device)


def whole(model: Decoder, x: Tensor) -> Tensor:
    """Hidden states of whole sequences, nothing cached."""
    positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    return model(x, positions, inverse_frequencies(model.config, x.shape[1]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=10)
@given(data=st.data())
@torch.no_grad()
def test_a_prompt_in_pieces_through_the_cache_is_the_prompt_at_once(architecture: str, data: st.DataObject) -> None:
    model = decoder(architecture)
    total = data.draw(st.integers(1, 24))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    x = embeddings(model, 2, total)
    cache, inv_freq = new_cache(model, 12), inverse_frequencies(model.config, total)
    blocks = data.draw(st.permutations(range(12)))
    tables = blocks[:6], blocks[6:]
    pieces = []
    for start, stop in pairwise(cuts):
        positions = torch.arange(start, stop).repeat(2)
        kv = KVBatch.of(cache, tables, [stop, stop], [stop - start] * 2)
        pieces.append(model(x[:, start:stop].flatten(0, 1), positions, inv_freq, kv).unflatten(0, (2, -1)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole(model, x), **TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_rows_of_different_lengths_decode_together_as_they_do_alone(architecture: str) -> None:
    model = decoder(architecture)
    lengths, steps, planned = [3, 17, 1, 9], 5, 24
    inv_freq = inverse_frequencies(model.config, planned)
    cache = new_cache(model, 6 * len(lengths))
    cache.keys.fill_(torch.nan)  # what earlier requests left behind must not count
    cache.values.fill_(torch.nan)
    tables = [list(range(row, 6 * len(lengths), len(lengths))) for row in range(len(lengths))]
    rows = [embeddings(model, 1, length + steps, seed=length)[0] for length in lengths]
    prompts = [x[:length] for x, length in zip(rows, lengths, strict=True)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    model(torch.cat(prompts), positions, inv_freq, KVBatch.of(cache, tables, lengths, lengths))
    for step in range(steps):
        lens = [length + step + 1 for length in lengths]
        x = torch.stack([x[length + step] for x, length in zip(rows, lengths, strict=True)])
        kv = KVBatch.of(cache, tables, lens, [1] * len(lens))
        hidden = model(x, torch.tensor(lens) - 1, inv_freq.expand(len(lens), -1), kv)
        for row, (x, length) in enumerate(zip(rows, lengths, strict=True)):
            alone = model(x[None], torch.arange(length + steps)[None], inv_freq)[0, length + step]
            torch.testing.assert_close(hidden[row], alone, **TOLERANCE)


@torch.no_grad()
def test_each_row_turns_by_its_own_frequencies() -> None:
    model = decoder()
    x, positions = embeddings(model, 3, 9), torch.arange(9).expand(3, -1)
    plain = inverse_frequencies(model.config)
    per_row = torch.stack((plain, plain / 2, plain / 3))
    together = model(x, positions, per_row)
    for row in range(3):
        alone = model(x[row : row + 1], positions[:1], per_row[row])
        torch.testing.assert_close(together[row : row + 1], alone, **TOLERANCE)
    assert not torch.allclose(together[1], model(x, positions, plain)[1], atol=1e-3)


@torch.no_grad()
def test_tokens_do_not_see_what_comes_after_them() -> None:
    model = decoder()
    x = embeddings(model, 1, 12)
    other = torch.cat((x[:, :7], embeddings(model, 1, 5, seed=1)), dim=1)
    torch.testing.assert_close(whole(model, x)[:, :7], whole(model, other)[:, :7], **TOLERANCE)


@torch.no_grad()
def test_only_distances_between_positions_count() -> None:
    model = decoder()
    x, inv_freq = embeddings(model, 1, 12), inverse_frequencies(model.config)
    shifted = model(x, torch.arange(100, 112)[None], inv_freq)
    # Angles of positions around 100 carry fp32 errors ten times those around 10.
    torch.testing.assert_close(shifted, whole(model, x), rtol=0.0, atol=2e-4)


@torch.no_grad()
def test_logits_are_fp32_whatever_the_weights_are() -> None:
    model = decoder(dtype=torch.bfloat16)
    hidden = whole(model, embeddings(model, 2, 5))
    assert hidden.dtype == torch.bfloat16
    assert model.logits(hidden).dtype == torch.float32
    assert model.logits(hidden[:, -1]).shape == (2, model.config.vocab_size)


@torch.no_grad()
def test_bf16_logits_stay_near_the_fp32_ones() -> None:
    config = chat_config()
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(config).items()}
    exact, half = (build(config, weights, dtype).language_model for dtype in (torch.float32, torch.bfloat16))
    ids = torch.arange(40)[None]
    expected = exact.logits(whole(exact, exact.embed(ids)))
    error = half.logits(whole(half, half.embed(ids))) - expected
    # Some dozen roundings of 2^-9 on average, in quadrature, in three layers.
    assert error.norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_reach_every_parameter(architecture: str) -> None:
    model = decoder(architecture).requires_grad_(True)
    ids = torch.arange(model.config.vocab_size)[None, :50]
    model.logits(whole(model, model.embed(ids))).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.endswith("qkv.bias"):
            # Softmax does not change when one constant joins all scores of a query: a key bias has no gradient
            # but for its rotation.
            continue
        assert parameter.grad.any(), name
