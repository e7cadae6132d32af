"""`runtime.image`: the tiles are the reference's, bit for bit, and bad input is refused and nothing else."""

import base64
import contextlib
import io
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from vitrail.runtime.errors import ConfigError, InvalidRequestError
from vitrail.runtime.image import (
    MAX_PIXELS,
    ImageLimits,
    choose_grid,
    count_tiles,
    image_size,
    open_image,
    plan_tiles,
    share_tiles,
    tile_image,
    tile_static,
)

# The pipeline once more, transcribed from its description without a thought for speed.


def reference_grid(width, height, tile_size, min_tiles, max_tiles):
    sides = range(1, max_tiles + 1)
    grids = [(i, j) for i in sides for j in sides if min_tiles <= i * j <= max_tiles]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0], grid[1]))
    aspect_ratio = width / height
    best_difference = float("inf")
    best = (1, 1)
    for i, j in grids:
        difference = abs(aspect_ratio - i / j)
        if difference < best_difference:
            best_difference = difference
            best = (i, j)
        elif difference == best_difference and width * height > 0.5 * tile_size * tile_size * i * j:
            best = (i, j)
    return best


def reference_tiles(image, tile_size, min_tiles, max_tiles, use_thumbnail):
    image = image.convert("RGB")
    columns, rows = reference_grid(image.width, image.height, tile_size, min_tiles, max_tiles)
    resized = image.resize((tile_size * columns, tile_size * rows))
    tiles = []
    for t in range(columns * rows):
        left, top = t % columns * tile_size, t // columns * tile_size
        tiles.append(resized.crop((left, top, left + tile_size, top + tile_size)))
    if use_thumbnail and len(tiles) != 1:
        tiles.append(image.resize((tile_size, tile_size)))
    # The transform of each tile, which must change nothing any more.
    return np.stack([np.asarray(tile.resize((tile_size, tile_size), Image.Resampling.BICUBIC)) for tile in tiles])


def noise(width, height, seed=0, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, bit_depth, colour_type, rows=b""):
    """A PNG file from its parts, for what Pillow does not write."""

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.fixture
def no_decoding(monkeypatch):
    """Fails the test when the pixels of a file are decoded."""

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


# Grids

WORKED_EXAMPLES = """
800x1300 6 2,3 7|800x1300 12 2,3 7|448x448 12 1,1 1|1x1 12 1,1 1|300x300 12 1,1 1|634x634 12 2,2 5|633x633 12 1,1 1
1000x1000 12 3,3 10|1000x1000 6 2,2 5|2000x2000 12 3,3 10|4000x500 12 8,1 9|4000x500 6 6,1 7|500x4000 12 1,8 9
500x4000 6 1,6 7|1920x1080 6 2,1 3|1920x1080 12 4,2 9|1080x1920 12 2,4 9|1024x768 12 4,3 13|1024x768 6 3,2 7
640x480 12 4,3 13|640x480 6 3,2 7|640x480 1 1,1 1|3840x2160 12 4,2 9|3840x2160 40 7,4 29|896x448 12 2,1 3
800x400 12 2,1 3|1240x1754 12 2,3 7|1240x1754 6 2,3 7|2480x3508 12 2,3 7|100x50 12 2,1 3|10x1000 12 1,12 13
640x360 12 2,1 3|612x408 12 3,2 7|4000x4000 40 6,6 37|1600x800 12 4,2 9|633x317 12 2,1 3|634x317 12 2,1 3
"""


@pytest.mark.parametrize("row", re.split(r"[|\n]", WORKED_EXAMPLES.strip()))
def test_the_grid_is_that_of_the_worked_example(row):
    size, most, grid, num_tiles = row.split(" ")
    width, height = map(int, size.split("x"))
    columns, rows = map(int, grid.split(","))
    assert plan_tiles((width, height), max_tiles=int(most)) == ((columns, rows), int(num_tiles))


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    tile_size=st.sampled_from([28, 224, 336, 448]),
    tiles=st.tuples(st.integers(1, 40), st.integers(1, 40)).map(sorted),
)
@settings(max_examples=300)
def test_the_grid_is_that_of_the_reference_for_every_size(width, height, tile_size, tiles):
    low, high = tiles
    assert choose_grid(width, height, tile_size, low, high) == reference_grid(width, height, tile_size, low, high)


def test_grids_equally_near_and_equally_large_are_tried_by_ascending_columns():
    assert choose_grid(500, 400, 448, 2, 2) == (1, 2)  # 1.25 lies between 1/2 and 2; the image is small
    assert choose_grid(1000, 800, 448, 2, 2) == (2, 1)  # large enough to move on to the next


@pytest.mark.parametrize(("low", "high"), [(0, 12), (1, 0), (5, 4), (1, -1), (1, 10**9)])
def test_tile_bounds_that_cannot_hold_are_refused(low, high):
    with pytest.raises(InvalidRequestError, match="min_tiles"):
        choose_grid(100, 100, 448, low, high)


# Tiles


@given(
    width=st.one_of(st.integers(1, 500), st.integers(1, 1000)),
    height=st.one_of(st.integers(1, 500), st.integers(1, 1000)),
    tile_size=st.sampled_from([28, 112, 448]),
    max_tiles=st.sampled_from([1, 6, 12]),
    use_thumbnail=st.booleans(),
    mode=st.sampled_from(["RGB", "RGB", "L", "RGBA", "CMYK"]),
    seed=st.integers(0, 2**32 - 1),
)
@example(448, 448, 448, 12, True, "RGB", 0)
@example(1, 1, 448, 12, True, "RGB", 0)
@example(896, 448, 448, 12, True, "RGB", 0)
@example(640, 480, 448, 12, True, "RGB", 0)
@example(3, 999, 448, 12, True, "RGB", 0)
@settings(max_examples=100)
def test_tiles_are_bit_equal_to_the_reference(width, height, tile_size, max_tiles, use_thumbnail, mode, seed):
    image = Image.fromarray(noise(width, height, seed, 4)).convert(mode)
    tiles = tile_image(image, tile_size, 1, max_tiles, use_thumbnail)
    assert np.array_equal(tiles, reference_tiles(image, tile_size, 1, max_tiles, use_thumbnail))
    assert len(tiles) == plan_tiles((width, height), tile_size, 1, max_tiles, use_thumbnail)[1]


@pytest.mark.slow
@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    max_tiles=st.sampled_from([1, 6, 12, 24, 40]),
    use_thumbnail=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(4000, 4000, 40, True, 0)
@example(1, 4000, 12, True, 0)
@example(4000, 1, 12, True, 0)
@example(20000, 1, 40, True, 0)
@example(2, 20000, 40, True, 0)
@settings(max_examples=200)
def test_tiles_are_bit_equal_to_the_reference_up_to_4000_pixels_a_side(width, height, max_tiles, use_thumbnail, seed):
    image = Image.fromarray(noise(width, height, seed))
    tiles = tile_image(image, 448, 1, max_tiles, use_thumbnail)
    assert np.array_equal(tiles, reference_tiles(image, 448, 1, max_tiles, use_thumbnail))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_every_mode_is_tiled_as_the_reference_converts_it(mode):
    grey = Image.fromarray(noise(90, 60, channels=0))
    image = Image.fromarray(noise(90, 60, channels=4))
    if mode == "PA":
        image = image.convert("P").convert("PA")
    elif mode in ("I", "F", "I;16"):
        image = grey.convert(mode)
    else:
        image = image.convert("RGB").convert(mode)
    assert np.array_equal(tile_image(image, 28), reference_tiles(image, 28, 1, 12, True))


@pytest.mark.parametrize("channels", [0, 3, 4])
def test_an_array_is_tiled_as_its_picture_is(channels):
    array = noise(90, 60, channels=channels)
    tiles = reference_tiles(Image.fromarray(array), 28, 1, 12, True)
    assert np.array_equal(tile_image(array, 28), tiles)
    strided = np.repeat(array, 2, axis=1)[:, ::2]
    assert np.array_equal(tile_image(strided, 28), tiles)


def test_tiles_are_row_major_with_the_thumbnail_last():
    array = np.zeros((20, 30, 3), np.uint8)
    for t in range(6):
        array[t // 3 * 10 :, t % 3 * 10 :][:10, :10] = 40 * t
    tiles = tile_image(array, 10, max_tiles=6)
    assert tiles.shape == (7, 10, 10, 3)
    assert tiles.dtype == np.uint8
    assert [int(tile[5, 5, 0]) for tile in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    assert np.array_equal(tiles[6], np.asarray(Image.fromarray(array).resize((10, 10))))


def test_one_tile_has_no_thumbnail():
    assert len(tile_image(noise(50, 50), 28, max_tiles=1)) == 1
    assert [count_tiles((1, 1)), count_tiles((2, 1)), count_tiles((2, 1), use_thumbnail=False)] == [1, 3, 2]


def test_tiling_changes_neither_the_image_nor_its_orientation_tag():
    image = Image.open(io.BytesIO(encoded(Image.fromarray(noise(40, 20)), "PNG", exif=orientation(6))))
    before = image.tobytes()
    assert np.array_equal(tile_image(image, 28), reference_tiles(image, 28, 1, 12, True))
    assert image.tobytes() == before
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("thing", ["path.png", None, noise(0, 5), Image.new("RGB", (5, 0)), np.zeros((2, 2))])
def test_what_is_no_picture_cannot_be_tiled(thing):
    with pytest.raises(InvalidRequestError, match=r"^image: "):
        tile_image(thing)
    with pytest.raises(InvalidRequestError, match=r"^image: "):
        tile_static(thing)


# The whole image as one tile


@pytest.mark.parametrize(("width", "height"), [(60, 60), (61, 30), (30, 61), (60, 31), (1, 60), (500, 333)])
def test_a_static_tile_is_the_resized_image_padded_or_not(width, height):
    image = Image.fromarray(noise(width, height))
    assert np.array_equal(tile_static(image, 28), np.asarray(image.resize((28, 28)))[None])

    side = max(width, height)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in (0.485, 0.456, 0.406)]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    assert np.array_equal(
        tile_static(image, 28, pad2square=True), np.asarray(Image.fromarray(square).resize((28, 28)))[None]
    )


def test_padding_to_an_enormous_square_is_refused():
    with pytest.raises(InvalidRequestError, match=r"^image 1: padded to 20000x20000 exceeds"):
        tile_static(Image.new("RGB", (20000, 100)), pad2square=True, name="image 1")


# Opening

LOSSLESS = ["PNG", "BMP", "GIF"]
ALL_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]


@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_every_source_of_every_format_gives_the_reference_pixels(kind, tmp_path):
    data = encoded(Image.fromarray(noise(37, 23)), kind)
    path = tmp_path / "picture.txt"  # recognised by content
    path.write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, url, Image.open(path), expected):
        picture = open_image(source)
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), expected)
        assert image_size(source) == (37, 23)


def test_alpha_is_dropped_without_compositing():
    array = noise(9, 7, channels=4)
    assert np.array_equal(np.asarray(open_image(array)), array[..., :3])
    data = encoded(Image.fromarray(array), "PNG")
    assert np.array_equal(np.asarray(open_image(data)), array[..., :3])


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency_opens_without_a_warning(transparency):
    image = Image.fromarray(noise(30, 20)).quantize(256)
    data = encoded(image, "PNG", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(open_image(data)), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg_is_converted_as_the_reference_converts_it():
    data = encoded(Image.fromarray(noise(30, 20)).convert("CMYK"), "JPEG")
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_16_bit_grey_is_clipped_as_the_reference_clips_it():
    levels = np.array([[0, 1, 128, 255, 256, 300, 40000, 65535]], np.uint16)
    data = encoded(Image.fromarray(levels), "PNG")
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    assert np.asarray(open_image(data))[0, :, 0].tolist() == [0, 1, 128, 255, 255, 255, 255, 255]


def test_16_bit_colour_keeps_its_high_byte():
    values = np.array([0x0000, 0x00FF, 0x1234, 0x80FF, 0xFF00, 0xFFFF], ">u2")
    data = png(2, 1, 16, 2, b"\0" + values.tobytes())
    assert np.asarray(open_image(data)).ravel().tolist() == [0x00, 0x00, 0x12, 0x80, 0xFF, 0xFF]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert open_image(data).getpixel((4, 3)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_the_orientation_is_applied_once_unless_it_is_switched_off(kind, value):
    data = encoded(Image.fromarray(noise(24, 16)), kind, exif=orientation(value))
    stored = Image.open(io.BytesIO(data)).convert("RGB")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    for source in (data, Image.open(io.BytesIO(data))):
        assert image_size(source) == upright.shape[1::-1]
        picture = open_image(source)
        assert np.array_equal(np.asarray(picture), upright)
        assert np.array_equal(np.asarray(open_image(picture)), upright)
        as_stored = ImageLimits(exif_orientation=False)
        assert image_size(source, as_stored) == (24, 16)
        assert np.array_equal(np.asarray(open_image(source, as_stored)), np.asarray(stored))


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", orientation(99).tobytes()])
def test_broken_orientation_metadata_turns_nothing(exif):
    data = encoded(Image.fromarray(noise(24, 16)), "JPEG", exif=exif)
    assert image_size(data) == open_image(data).size == (24, 16)


@given(
    kind=st.sampled_from(ALL_FORMATS),
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"]),
    value=st.integers(0, 9),
    width=st.integers(1, 60),
    height=st.integers(1, 60),
)
@settings(max_examples=100)
def test_the_size_from_the_header_is_that_of_the_decoded_picture(kind, mode, value, width, height):
    image = Image.fromarray(noise(width, height, channels=0)).convert(mode)
    try:
        data = encoded(image, kind, **({"exif": orientation(value)} if kind in ("JPEG", "PNG", "WEBP") else {}))
    except (OSError, ValueError):  # a mode that the format cannot hold
        data = encoded(image.convert("RGB"), kind)
    size = image_size(data)
    assert size == open_image(data).size
    assert sorted(size) == sorted((width, height))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
def test_the_size_is_read_without_decoding(kind, no_decoding):
    data = encoded(Image.fromarray(noise(60, 40)), kind)
    assert image_size(data) == (60, 40)
    with pytest.raises(InvalidRequestError, match="cannot decode"):
        open_image(data)


def test_the_size_is_read_from_a_png_without_orientation_too(no_decoding):
    assert image_size(png(60, 40, 8, 2, b"")) == (60, 40)


def test_a_grey_array_becomes_three_equal_channels():
    array = noise(9, 7, channels=0)
    assert np.array_equal(np.asarray(open_image(array)), np.stack([array] * 3, axis=-1))


def test_an_rgb_picture_is_not_copied():
    image = Image.new("RGB", (4, 4))
    assert open_image(image) is image


# Limits


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (1, 201), (403, 2)])
def test_a_sliver_is_refused_before_it_is_decoded(size, no_decoding):
    data = png(*size, 8, 2)
    for check in (image_size, open_image):
        with pytest.raises(InvalidRequestError, match=rf"^image 3: {size[0]}x{size[1]} exceeds the aspect ratio limit"):
            check(data, name="image 3")
        with pytest.raises(InvalidRequestError, match="aspect ratio"):
            check(Image.new("RGB", size))


def test_the_limits_are_inclusive():
    limits = ImageLimits(max_pixels=2000, max_aspect_ratio=20)
    assert image_size(png(200, 10, 8, 2), limits) == (200, 10)
    for size, reason in (((40, 51), "2000 pixels"), ((201, 9), "aspect ratio limit of 20")):
        with pytest.raises(InvalidRequestError, match=reason):
            image_size(png(*size, 8, 2), limits)


@pytest.mark.parametrize("side", [13378, 50000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(side, no_decoding):
    for check in (image_size, open_image):
        with pytest.raises(InvalidRequestError, match=rf"^image: .*exceeds the limit of {MAX_PIXELS} pixels$"):
            check(png(side, side, 8, 2))


def test_a_png_that_claims_no_pixels_is_refused():
    for size in ((0, 5), (5, 0)):
        with pytest.raises(InvalidRequestError, match=r"^image: "):
            open_image(png(*size, 8, 2))


@pytest.mark.parametrize("field", ["max_pixels", "max_aspect_ratio", "max_data_url_length"])
def test_limits_that_would_refuse_everything_are_a_configuration_error(field):
    with pytest.raises(ConfigError, match=field):
        ImageLimits(**{field: 0})


# Bad sources


def refusal(source, **keywords):
    """The message with which a source is refused: one line that begins with the name, and no decoder's error behind."""
    with pytest.raises(InvalidRequestError) as caught:
        open_image(source, name="image 2", **keywords)
    message = str(caught.value)
    assert message.startswith("image 2: ")
    assert "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


@pytest.mark.parametrize("kind", ALL_FORMATS)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_truncated_file_cannot_be_decoded(kind, share):
    data = encoded(Image.fromarray(noise(120, 90)), kind)
    assert refusal(data[: int(share * len(data))]).startswith("image 2: cannot decode")


@given(kind=st.sampled_from(ALL_FORMATS), position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@settings(max_examples=200)
def test_a_damaged_byte_gives_a_picture_or_a_refusal(kind, position, byte):
    data = bytearray(encoded(Image.fromarray(noise(20, 20)), kind))
    data[int(position * len(data))] = byte
    size = None
    with contextlib.suppress(InvalidRequestError):
        size = open_image(bytes(data)).size
    if size is None:
        refusal(bytes(data))
    else:
        assert image_size(bytes(data)) == size


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>404</body></html>",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"BM",
        b"\x89PNG\r\n\x1a\n",
        b"\0",
    ],
)
def test_bytes_that_are_no_picture_cannot_be_decoded(data):
    assert refusal(data).startswith("image 2: cannot decode")


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_formats_beyond_the_five_are_refused(kind):
    message = refusal(encoded(Image.new("RGB", (16, 16)), kind))
    assert message == "image 2: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image"


def test_a_decoder_s_own_text_is_never_repeated(monkeypatch):
    def load(self):
        raise OSError("heap at 0x7f0011223344")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert refusal(encoded(Image.new("RGB", (4, 4)), "PNG")) == "image 2: cannot decode"


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    assert refusal(tmp_path / "none.png") == f"image 2: no such file: '{tmp_path}/none.png'"
    assert refusal(tmp_path / "empty.png" / "none.png").startswith("image 2: no such file: ")
    assert refusal(str(tmp_path)) == f"image 2: '{tmp_path}' is a directory"
    assert refusal(tmp_path / "empty.png") == f"image 2: '{tmp_path}/empty.png' is empty"
    assert refusal("a\0b.png").startswith("image 2: cannot read ")
    assert len(refusal("x" * 100_000)) < 300
    assert refusal("line\nbreak.png").startswith("image 2: no such file: ")
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").endswith("is not a regular file")

    def denied(*args):
        raise PermissionError

    (tmp_path / "secret.png").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", denied)
    assert refusal(tmp_path / "secret.png") == f"image 2: cannot read '{tmp_path}/secret.png'"


@pytest.mark.parametrize("url", ["http://example.org/a.png", "HTTPS://example.org/a.png", "file:///etc/passwd"])
def test_urls_are_not_fetched(url):
    assert refusal(url).startswith("image 2: URLs are not fetched here")


def test_data_urls_that_cannot_be_read_are_refused():
    assert "must read" in refusal("data:image/png,abc")
    assert "must read" in refusal("data:image/png;base64")
    assert "not valid base64" in refusal("data:image/png;base64,***")
    assert "not valid base64" in refusal("data:image/png;base64,caf\u00e9")
    assert "cannot decode" in refusal("data:image/png;base64,")
    assert "cannot decode" in refusal("data:image/png;base64,AAAA")
    assert "of 46 characters exceeds the limit of 45" in refusal(
        "DATA:image/png;base64," + "A" * 24, limits=ImageLimits(max_data_url_length=45)
    )


@pytest.mark.parametrize(
    "array",
    [
        noise(4, 4).astype(np.float32),
        noise(4, 4).astype(np.uint16),
        noise(4, 4, channels=2),
        noise(4, 4)[None],
        np.zeros(3),
    ],
)
def test_an_array_of_another_type_or_shape_is_refused(array):
    message = refusal(array)
    assert "uint8 of shape (height, width[, 3 or 4])" in message
    assert f"{array.dtype} {array.shape}" in message


@pytest.mark.parametrize("source", [None, 7, ["a.png"], noise(0, 4), noise(4, 0), Image.new("RGB", (0, 4))])
def test_other_sources_and_empty_pictures_are_refused(source):
    refusal(source)


def test_a_picture_opened_by_the_caller_from_a_truncated_file_is_refused():
    data = encoded(Image.fromarray(noise(90, 90)), "PNG")
    assert refusal(Image.open(io.BytesIO(data[: len(data) // 2]))) == "image 2: cannot decode"


# Sharing tiles

SIZES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=8)


def total_tiles(sizes, most, min_tiles=1, use_thumbnail=True):
    pairs = zip(sizes, most, strict=True)
    return sum(plan_tiles(size, 448, min_tiles, own, use_thumbnail)[1] for size, own in pairs)


@given(sizes=SIZES, budget=st.integers(0, 120), use_thumbnail=st.booleans(), data=st.data())
@settings(max_examples=200)
def test_shared_tiles_keep_to_the_budget_and_leave_no_higher_cap(sizes, budget, use_thumbnail, data):
    own = data.draw(st.lists(st.integers(1, 24), min_size=len(sizes), max_size=len(sizes)))
    if budget < len(sizes):
        with pytest.raises(InvalidRequestError, match=f"total_max_tiles={budget} is too few for {len(sizes)} image"):
            share_tiles(sizes, own, budget, use_thumbnail=use_thumbnail)
        return
    shared = share_tiles(sizes, own, budget, use_thumbnail=use_thumbnail)
    cap = max(shared)
    assert shared == [min(most, cap) for most in own]
    assert total_tiles(sizes, shared, 1, use_thumbnail) <= budget
    if shared != own:
        higher = [min(most, cap + 1) for most in own]
        assert total_tiles(sizes, higher, 1, use_thumbnail) > budget


def test_a_budget_that_holds_everything_changes_nothing():
    assert share_tiles([(640, 480), (100, 100)], [12, 6], 14) == [12, 6]
    assert share_tiles([], [], 0) == []


def test_min_tiles_is_the_floor_of_a_share():
    sizes = [(640, 480)] * 2
    assert share_tiles(sizes, [12, 12], 6, min_tiles=2) == [3, 3]  # two tiles and the thumbnail each
    with pytest.raises(InvalidRequestError, match="which need 6"):
        share_tiles(sizes, [12, 12], 5, min_tiles=2)
    assert share_tiles(sizes, [12, 1], 4, min_tiles=2) == [3, 1]  # a lower maximum of an image's own wins
