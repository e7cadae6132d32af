"""QLLaMA's cache and what it refuses; its arithmetic stands in tests/parity/test_contrastive.py."""

import pytest
import torch

from vitrail.runtime.config import parse_contrastive_config
from vitrail.runtime.models.qllama import QLLaMACache

from ...random_checkpoints import build_contrastive, contrastive_config, random_tiles, random_weights

CONFIG = contrastive_config()
QUERIES = 6


@pytest.fixture(scope="module")
def model():
    return build_contrastive(CONFIG, random_weights(CONFIG))


def cache(rows, length):
    llm = parse_contrastive_config(CONFIG).llm
    return QLLaMACache(llm, rows, length, dtype=torch.float32, device=torch.device("cpu"))


def positions(start, stop, rows=1):
    return torch.arange(start, stop).expand(rows, -1)


def test_text_in_pieces_through_the_cache_is_the_text_at_once(model):
    ids = torch.randint(0, 509, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = model.qllama(model.qllama.embed(ids), positions(0, 12, 2))
    kept = cache(2, 12)
    pieces = [
        model.qllama(model.qllama.embed(ids[:, start:stop]), positions(start, stop, 2), cache=kept)
        for start, stop in ((0, 5), (5, 6), (6, 12))
    ]
    assert kept.used == 12
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-6, rtol=1e-5)


def test_queries_do_not_see_what_follows_them(model):
    vision = model.vision_model(random_tiles(1, 84))
    texts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    x = torch.cat((model.query_tokens.expand(2, -1, -1), model.qllama.embed(texts)), 1)
    hidden = model.qllama(x, positions(0, 9, 2), prefix=QUERIES, vision=vision.expand(2, -1, -1))
    torch.testing.assert_close(hidden[0, :QUERIES], hidden[1, :QUERIES])
    torch.testing.assert_close(hidden[:1, :QUERIES], model.encode_queries(vision), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(hidden[0, QUERIES:], hidden[1, QUERIES:], atol=1e-2)


def test_a_cache_that_is_full_says_by_how_much(model):
    with pytest.raises(ValueError, match="qllama cache: 9 tokens exceed the 8 allocated"):
        model.qllama(torch.zeros(1, 9, 64), positions(0, 9), cache=cache(1, 8))


def test_an_image_needs_its_queries_and_a_prefix_an_empty_cache(model):
    vision = model.vision_model(random_tiles(1, 84))
    with pytest.raises(ValueError, match="an image needs 6 queries, x has 5 positions"):
        model.qllama(torch.zeros(1, 5, 64), positions(0, 5), vision=vision)
    kept = cache(1, 20)
    model.qllama(torch.zeros(1, 3, 64), positions(0, 3), cache=kept)
    with pytest.raises(ValueError, match="a prefix of 6 behind 3 cached positions"):
        model.qllama(torch.zeros(1, 6, 64), positions(3, 9), prefix=6, cache=kept)
