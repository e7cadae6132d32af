"""The C++ tile resizer gives Pillow's bytes: for every size, grid, instruction set, number of threads and Pillow."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.kernels.cpu_extension import extension, missing_because
from vitrail.runtime import image as image_module
from vitrail.runtime.image import _fill_with_extension, _pass_order, choose_grid, count_tiles, tile_image

BICUBIC = Image.Resampling.BICUBIC
ISAS = extension.instruction_sets() if extension else []

pytestmark = pytest.mark.skipif(extension is None, reason=missing_because)


def picture(width, height, content="noise", seed=0):
    """Noise finds wrong weights, black and white noise finds missing clipping."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels if content == "noise" else (pixels & 128) // 128 * 255)


def cut(resized, size):
    return [
        np.asarray(resized.crop((left, top, left + size, top + size)))
        for top in range(0, resized.height, size)
        for left in range(0, resized.width, size)
    ]


def pillow_tiles(image, size, grids):
    """The official pipeline: resize, crop, thumbnail last."""
    return np.stack(
        [tile for columns, rows in grids for tile in cut(image.resize((columns * size, rows * size), BICUBIC), size)]
    )


def two_passes(image, size, grid, height_first):
    """Pillow's two passes one by one, so that their order does not depend on its version."""
    width, height = grid[0] * size, grid[1] * size
    between = (image.width, height) if height_first else (width, image.height)
    return np.stack(cut(image.resize(between, BICUBIC).resize((width, height), BICUBIC), size))


def fill(image, size, grids, isa="", threads=1, blocks=None, height_first=None):
    """The extension's tiles, with bytes before and behind them that it must leave alone."""
    guarded = np.full((sum(columns * rows for columns, rows in grids) + 2, size, size, 3), 77, np.uint8)
    order = _pass_order() if height_first is None else lambda old, new: height_first
    if blocks is None:
        _fill_with_extension(guarded[1:-1], image, grids, order, threads, isa)
    else:
        ordered = [(c, r, order(image.size, (c * size, r * size))) for c, r in grids]
        extension.fill_tiles(guarded[1:-1], ordered, *image.size, blocks, threads=threads, isa=isa)
    assert (guarded[[0, -1]] == 77).all()
    return guarded[1:-1]


# Sides of all magnitudes alike.
SIDE = st.floats(0, 1).map(lambda share: round(700**share))
CASES = st.tuples(SIDE, SIDE, st.sampled_from([1, 2, 7, 14, 28, 56, 100, 112]), st.integers(1, 12))


def check_tiles(case, content, seed, threads):
    width, height, size, most = case
    image = picture(width, height, content, seed)
    grid = choose_grid(width, height, size, 1, most)
    grids = [grid, (1, 1)] if count_tiles(grid) > 1 else [grid]
    expected = pillow_tiles(image, size, grids)
    for isa in ISAS:
        assert np.array_equal(fill(image, size, grids, isa, threads), expected), isa


@given(CASES, st.sampled_from(["noise", "extremes"]), st.integers(0, 2**32 - 1), st.integers(1, 3))
@settings(max_examples=200)
@example((1, 1, 448, 1), "noise", 0, 1)  # one pixel
@example((448, 448, 448, 12), "noise", 0, 2)  # nothing to resize
@example((1, 700, 56, 12), "extremes", 0, 1)  # one pixel wide
@example((700, 1, 56, 12), "extremes", 0, 1)
@example((3, 5000, 28, 12), "noise", 0, 1)  # extreme aspect ratios, with windows of hundreds of pixels
@example((5000, 3, 28, 12), "noise", 0, 1)
@example((640, 480, 448, 6), "noise", 0, 2)  # strips that part a tile
def test_tiles_are_the_official_pipelines(case, content, seed, threads):
    check_tiles(case, content, seed, threads)


@pytest.mark.slow
@given(
    st.tuples(
        st.floats(0, 1).map(lambda share: round(3000**share)),
        st.floats(0, 1).map(lambda share: round(3000**share)),
        st.integers(1, 150) | st.sampled_from([224, 336, 448]),
        st.integers(1, 12),
    ),
    st.sampled_from(["noise", "extremes"]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
)
@settings(max_examples=4000)
def test_tiles_are_the_official_pipelines_for_thousands_of_sizes(case, content, seed, threads):
    check_tiles(case, content, seed, threads)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (2480, 3508), (12000, 500), (1920, 1080)])
def test_photographs_and_pages_have_the_official_tiles(size):
    check_tiles((*size, 448, 12), "noise", 0, 2)


@given(
    st.tuples(SIDE, SIDE),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([3, 16, 60]),
    st.booleans(),
    st.sampled_from(ISAS or [""]),
)
@settings(max_examples=100)
def test_either_side_can_be_resized_first(size, grid, tile_size, height_first, isa):
    image = picture(*size, "extremes")
    expected = two_passes(image, tile_size, grid, height_first)
    assert np.array_equal(fill(image, tile_size, [grid], isa, height_first=height_first), expected)


def test_the_order_of_the_installed_pillow_is_found_and_matters():
    image = picture(90, 400)
    assert not np.array_equal(*(two_passes(image, 56, (1, 1), first) for first in (False, True)))
    assert _pass_order() is not None
    assert np.array_equal(fill(image, 56, [(1, 1)]), pillow_tiles(image, 56, [(1, 1)]))


def test_a_pillow_of_unknown_order_makes_the_tiles_itself(monkeypatch):
    image = picture(300, 200)
    expected = tile_image(image, 56)
    monkeypatch.setattr(image_module, "_PASS_ORDERS", (lambda old, new: old[0] > new[0],))
    monkeypatch.setattr(image_module, "_pass_order", _pass_order.__wrapped__)
    assert image_module._pass_order() is None
    assert np.array_equal(tile_image(image, 56), expected)


def test_without_the_extension_the_bytes_are_the_same(monkeypatch):
    image = picture(300, 500)
    expected = tile_image(image, 56, num_threads=2)
    monkeypatch.setattr(image_module, "extension", None)
    monkeypatch.setattr(image_module, "_pass_order", _pass_order.__wrapped__)
    assert np.array_equal(tile_image(image, 56), expected)


@pytest.mark.parametrize("height_first", [False, True])
@pytest.mark.parametrize("rows", [16, 48, 1000])
@pytest.mark.parametrize("exported", [True, False], ids=["arrow", "numpy"])
def test_blocks_of_any_kind_and_height_give_the_same_tiles(rows, exported, height_first):
    image = picture(203, 101)
    expected = two_passes(image, 40, (2, 1), height_first)
    for isa in ISAS:
        parts = [image.crop((0, top, 203, min(top + rows, 101))) for top in range(0, 101, rows)]
        blocks = [part.__arrow_c_array__() if exported else np.asarray(part) for part in parts]
        assert np.array_equal(fill(image, 40, [(2, 1)], isa, 2, iter(blocks), height_first), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library for a closed page")
def test_nothing_behind_the_pixels_is_read():
    """The image ends where a page begins that may not be read: a process that does so dies."""
    code = """
import ctypes, mmap
import numpy as np
from vitrail._cpu import fill_tiles, instruction_sets
memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
pages = np.frombuffer(memory, np.uint8)
closed = ctypes.c_void_p(pages.ctypes.data + mmap.PAGESIZE)
assert ctypes.CDLL(None).mprotect(closed, mmap.PAGESIZE, 0) == 0
for width in range(1, 40):
    for height in (1, 2, 5, 17):
        image = pages[mmap.PAGESIZE - 3 * width * height : mmap.PAGESIZE].reshape(height, width, 3)
        for isa in instruction_sets():
            for height_first in (False, True):
                tiles = np.empty((2, 8, 8, 3), np.uint8)
                fill_tiles(tiles, [(2, 1, height_first)], width, height, [image], threads=1, isa=isa)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout == "alive\n", (done.returncode, done.stderr)


def test_python_threads_can_make_tiles_at_the_same_time():
    images = [picture(400 + 10 * i, 300, seed=i) for i in range(4)]
    expected = [tile_image(image, 112) for image in images]
    found = [None] * 4

    def work(index):
        for _ in range(5):
            found[index] = tile_image(images[index], 112, num_threads=3)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [
        ([(16, 8)], "end before the image does"),
        ([(40, 8)], "a block of 40 rows where 32 are missing"),
        ([(8, 8), (24, 8)], "a multiple of 16"),
        ([(32, 9)], r"shape \(rows, 8, 3\)"),
        ([(32, 8), (1, 8)], "where 0 are missing"),
    ],
)
def test_blocks_that_do_not_make_the_image_are_refused(blocks, complaint):
    arrays = [np.zeros((rows, width, 3), np.uint8) for rows, width in blocks]
    with pytest.raises(ValueError, match=complaint):
        extension.fill_tiles(np.empty((1, 4, 4, 3), np.uint8), [(1, 1, False)], 8, 32, arrays, threads=1)


def test_blocks_of_another_layout_are_refused():
    def feed(*blocks):
        extension.fill_tiles(np.empty((1, 4, 4, 3), np.uint8), [(1, 1, False)], 8, 32, blocks, threads=1)

    for array in (np.zeros((32, 8, 4), np.uint8), np.zeros((32, 8, 3), np.int16), np.zeros((64, 8, 3), np.uint8)[::2]):
        with pytest.raises(ValueError, match="contiguous uint8"):
            feed(array)
    for other in (Image.new("L", (8, 32)), Image.new("F", (8, 32))):
        with pytest.raises(ValueError, match="four uint8"):
            feed(other.__arrow_c_array__())
    exported = Image.new("RGB", (9, 15)).__arrow_c_array__()
    with pytest.raises(ValueError, match="whole rows of 8 pixels"):
        feed(exported)
    with pytest.raises(ValueError, match="incorrect name"):
        feed(exported[::-1])
    with pytest.raises(ValueError, match="a schema and an array"):
        feed(exported[:1])


def test_tiles_grids_and_instruction_sets_are_checked():
    def feed(tiles, grids=((1, 1, False),), size=(8, 16), isa=""):
        blocks = [np.zeros((16, 8, 3), np.uint8)]
        extension.fill_tiles(tiles, list(grids), *size, blocks, threads=1, isa=isa)

    with pytest.raises(ValueError, match=r"\(2, size, size, 3\)"):
        feed(np.empty((1, 4, 4, 3), np.uint8), [(1, 2, False)])
    with pytest.raises(ValueError, match="size, size"):
        feed(np.empty((1, 4, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="at least one pixel"):
        feed(np.empty((1, 4, 4, 3), np.uint8), size=(0, 16))
    with pytest.raises(ValueError, match="at least one pixel"):
        feed(np.empty((1, 4, 4, 3), np.uint8), [(-1, -1, False)])
    with pytest.raises(ValueError, match="'sse9' does not run here; these do: portable"):
        feed(np.empty((1, 4, 4, 3), np.uint8), isa="sse9")
    with pytest.raises(TypeError):
        feed(np.empty((1, 4, 4, 3), np.float32))
    locked = np.empty((1, 4, 4, 3), np.uint8)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        feed(locked)
