"""Keys of images and the cache of their visual tokens."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitrail.runtime.engine.vision_cache import (
    LoadedImage,
    VisionCache,
    domain_key,
    read_once,
    source_digest,
    tiles_key,
)
from vitrail.runtime.errors import InvalidRequestError

from .tiny_model import picture

DOMAIN = domain_key("model", "revision")


def tiles_of(seed: int, count: int = 2):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def test_equal_tiles_have_one_key_and_anything_else_another() -> None:
    tiles = tiles_of(0)
    other = tiles.copy()
    other[-1, -1, -1, -1] ^= 1
    keys = {
        tiles_key(tiles, DOMAIN),
        tiles_key(other, DOMAIN),
        tiles_key(tiles[:1], DOMAIN),
        tiles_key(tiles.reshape(1, 8, 4, 3), DOMAIN),
        tiles_key(tiles, domain_key("model", "another revision")),
    }
    assert len(keys) == 5
    assert tiles_key(tiles.copy(), DOMAIN) in keys
    assert {len(key) for key in keys} == {32}


def test_names_cannot_be_moved_from_one_part_of_a_domain_to_the_next() -> None:
    assert len({domain_key("ab", "c"), domain_key("a", "bc"), domain_key("abc"), domain_key("ab", "c", "")}) == 4


def test_a_source_is_told_by_its_content_and_its_kind(tmp_path) -> None:
    pixels = picture(8, 6)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert source_digest(read_once(tmp_path / "a.png", name="x")) == source_digest(data)
    assert source_digest(read_once(str(tmp_path / "a.png"), name="x")) == source_digest(data)
    assert source_digest(pixels) == source_digest(np.asfortranarray(pixels))
    digests = {source_digest(data), source_digest(pixels), source_digest(pixels.reshape(6, 4, 6))}
    digests |= {source_digest("data:image/png;base64,AAAA"), source_digest(b"data:image/png;base64,AAAA")}
    assert len(digests) == 5
    assert source_digest(Image.fromarray(pixels)) is None
    with pytest.raises(InvalidRequestError, match="image 3: no such file"):
        read_once(tmp_path / "b.png", name="image 3")


def test_an_image_seen_before_is_neither_decoded_nor_cut() -> None:
    cache, calls = VisionCache(1000), []

    def cut(seed: int):
        def run() -> LoadedImage:
            calls.append(seed)
            return LoadedImage(tiles=tiles_of(seed))

        return run

    first = cache.load(b"name", DOMAIN, cut(1))
    assert (calls, first.tokens) == ([1], None)
    assert cache.put(first.key, "tokens", 10)
    again = cache.load(b"name", DOMAIN, cut(1))
    assert (calls, again.key, again.tokens, again.tiles) == ([1], first.key, "tokens", None)
    # Under another name, or without one, it has to be cut before it is known.
    for name in (b"other", None):
        known = cache.load(name, DOMAIN, cut(1))
        assert (known.key, known.tokens, known.tiles) == (first.key, "tokens", None)
    assert calls == [1, 1, 1]
    # What another tenant has seen is not known.
    assert cache.load(b"name", domain_key("other"), cut(1)).tokens is None
    assert (cache.hits, cache.misses) == (3, 2)


def test_a_name_outlives_its_tokens_but_what_is_gone_is_made_again() -> None:
    cache = VisionCache(10)
    key = cache.load(b"a", DOMAIN, lambda: LoadedImage(tiles=tiles_of(1))).key
    cache.put(key, "tokens", 8)
    cache.put(b"x", "others", 8)
    loaded = cache.load(b"a", DOMAIN, lambda: LoadedImage(tiles=tiles_of(1)))
    assert loaded.tokens is None
    assert loaded.tiles is not None


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 12), st.booleans()), max_size=40))
def test_the_least_recently_used_go_first_and_the_size_keeps_within_its_limit(actions) -> None:
    cache, limit = VisionCache(20), 20
    expected: dict[bytes, int] = {}  # oldest first
    for number, size, put in actions:
        key = bytes([number])
        if put:
            assert cache.put(key, number, size)
            size = expected.pop(key, size)
            expected[key] = size
            while sum(expected.values()) > limit:
                expected.pop(next(iter(expected)))
        else:
            assert cache.get(key) == (number if key in expected else None)
            if key in expected:
                expected[key] = expected.pop(key)
        cache.check_integrity()
        assert list(cache._entries) == list(expected)
    assert not cache.put(b"large", 0, 21)


def test_threads_may_use_it_at_once() -> None:
    cache = VisionCache(50)

    def use(seed: int) -> None:
        for step in range(200):
            key = bytes([(seed + step) % 9])
            cache.put(key, step, 1 + (seed * step) % 20)
            cache.get(key)
            cache.load(key, DOMAIN, lambda: LoadedImage(tiles=tiles_of(0, 1)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    cache.check_integrity()


def test_a_file_that_is_read_once_gives_the_same_picture(tmp_path) -> None:
    Image.fromarray(picture(8, 6)).save(tmp_path / "a.png")
    data = read_once(tmp_path / "a.png", name="x")
    assert isinstance(data, bytes)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture(8, 6))
