"""Files that callers send: the odd ones are read as documented, the bad ones are refused in fixed words, and the next
request is answered."""

import base64
import time

import numpy as np
import pytest

from vitrail.runtime import Runtime
from vitrail.runtime.errors import ConfigError, InvalidRequestError
from vitrail.runtime.image import ImageLimits, image_size, open_image

from ..image_corpora import NOISE, bad_images, encoded, odd_images, slow_jpeg
from .tiny_model import assert_idle, write_tiny_model

ODD, BAD = odd_images(), bad_images()


@pytest.fixture(scope="module")
def rt(sentencepiece_folder):
    with Runtime.from_pretrained(write_tiny_model(sentencepiece_folder()), dtype="float32", device="cpu") as runtime:
        yield runtime
        assert_idle(runtime.engine)


def messages(data, *texts):
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"  # whatever it is
    parts = [{"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, *parts]}]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_seen_as_documented(rt, name):
    data, pixels = ODD[name]
    assert image_size(data) == (pixels.shape[1], pixels.shape[0])
    assert np.array_equal(np.asarray(open_image(data)), pixels)
    output = rt.chat(messages(data, "what?"), max_new_tokens=2)
    expected = rt.generate("what?", pixels, max_new_tokens=2)
    assert output.num_tiles == expected.num_tiles
    assert output.token_ids == expected.token_ids


def test_exif_orientation_may_be_left_alone():
    data, _ = ODD["exif 6"]
    assert np.array_equal(np.asarray(open_image(data, ImageLimits(exif_orientation=False))), ODD["exif 1"][1])


@pytest.fixture(scope="module")
def answer(rt):
    return rt.chat(messages(encoded(NOISE, "PNG"), "what?"), max_new_tokens=2).token_ids


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_in_fixed_words_and_the_next_request_is_answered(rt, answer, name):
    data, text = BAD[name]
    start = time.monotonic()
    with pytest.raises(InvalidRequestError) as caught:
        rt.chat(messages(data, "what?"), max_new_tokens=2)
    assert str(caught.value).removeprefix("image 1: ").endswith(text)
    assert len(str(caught.value)) < 120
    assert time.monotonic() - start < 2  # nothing large was decoded
    assert rt.chat(messages(encoded(NOISE, "PNG"), "what?"), max_new_tokens=2).token_ids == answer


def test_a_bad_image_is_named_by_its_number(rt):
    [message] = messages(encoded(NOISE, "PNG"))
    [bad] = messages(BAD["jpeg cut short"][0])
    both = [{"role": "user", "content": message["content"] + bad["content"]}]
    with pytest.raises(InvalidRequestError, match=r"^image 2: cannot decode$"):
        rt.chat(both, max_new_tokens=1)


def test_decoding_ends_with_its_time():
    """Were it not for the clock, this megabyte would take some minutes."""
    data = slow_jpeg()
    start = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"^image 3: cannot decode within 0\.3 s$"):
        open_image(data, ImageLimits(max_decode_s=0.3), name="image 3")
    assert time.monotonic() - start < 5
    with pytest.raises(ConfigError, match="max_decode_s must be above 0"):
        ImageLimits(max_decode_s=0)


def test_a_header_that_takes_too_long_is_given_up(monkeypatch):
    clock = iter([0.0, *[99.0] * 9])
    monkeypatch.setattr("vitrail.runtime.image.time.monotonic", lambda: next(clock))
    with pytest.raises(InvalidRequestError, match=r"^image: cannot decode within 10 s$"):
        image_size(encoded(NOISE, "PNG"))
