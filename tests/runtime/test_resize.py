"""One image as one input: cropped or stretched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitrail.runtime.errors import InvalidRequestError
from vitrail.runtime.resize import fit_image, read_image_size

from .tiny_model import picture

SIDES = st.integers(1, 150)


@pytest.mark.parametrize("crop", [False, True])
@given(width=SIDES, height=SIDES, size=st.tuples(SIDES, SIDES))
def test_every_image_gets_the_size_asked_for(crop, width, height, size):
    fitted = fit_image(Image.fromarray(picture(width, height)), size, crop=crop)
    assert fitted.shape == (*size, 3)
    assert fitted.dtype == np.uint8
    assert fitted.flags.writeable


@given(width=SIDES, height=SIDES, side=SIDES)
def test_a_square_crop_is_the_shorter_side_resized_and_the_middle(width, height, side):
    image = Image.fromarray(picture(width, height))
    short, long = sorted((width, height))
    new_long = int(side * long / short)
    scaled = (side, new_long) if width <= height else (new_long, side)
    resized = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
    top, left = (scaled[1] - side) // 2, (scaled[0] - side) // 2
    expected = resized[top : top + side, left : left + side]
    assert np.array_equal(fit_image(image, (side, side), crop=True), expected)


@pytest.mark.parametrize("crop", [False, True])
def test_an_image_of_the_size_is_left_as_it_is(crop):
    image = picture(56, 42)
    assert np.array_equal(fit_image(Image.fromarray(image), (42, 56), crop=crop), image)


def test_a_crop_keeps_the_middle_third_of_a_strip():
    strip = np.zeros((28, 84, 3), np.uint8)
    strip[:, 28:56] = 255
    assert (fit_image(Image.fromarray(strip), (28, 28), crop=True) == 255).all()
    assert (fit_image(Image.fromarray(strip.swapaxes(0, 1)), (28, 28), crop=True) == 255).all()
    assert not (fit_image(Image.fromarray(strip), (28, 28), crop=False) == 255).all()


@pytest.mark.parametrize(("asked", "size"), [(None, (84, 84)), (112, (112, 112)), ((28, 42), (28, 42))])
def test_a_size_is_a_side_or_a_pair(asked, size):
    assert read_image_size(asked, 84, 14) == size


@pytest.mark.parametrize("wrong", [13, 0, -14, True, 14.0, "224", (14,), (14, 15), (14, 28, 42), [0, 14]])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(wrong):
    with pytest.raises(InvalidRequestError, match="must be a positive multiple of 14"):
        read_image_size(wrong, 84, 14)
