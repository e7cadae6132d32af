"""Images: opened within limits, cut into tiles bit-equal to the reference's Pillow pipeline, planned from sizes alone.

What becomes of a picture before the model sees it:

- JPEG, PNG, WebP, BMP and GIF (the first frame) are recognised by content; every other format is refused.
- Everything becomes RGB by Pillow's `convert("RGB")`, as in the reference: alpha is dropped without compositing,
  palettes and CMYK are converted, 16-bit colour keeps its high byte, 16-bit *grey* is clipped at 255 (scale it first).
- The EXIF orientation that stands before the pixels is applied, unless `ImageLimits.exif_orientation` is off (the
  reference ignores it).
- Limits are checked on the header, before a pixel is decoded. A decoder that asks for more bytes when its time is over
  ends there: a small file may hold hours of work. No error repeats a decoder's own text.
"""

import base64
import binascii
import io
import os
import re
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from ..kernels.cpu_extension import extension
from .errors import ConfigError, InvalidRequestError

ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]
Size = tuple[int, int]  # width, height
Grid = tuple[int, int]  # columns, rows

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses; a higher limit of ours would have no effect
MAX_TILES = 1024  # a bound on the grid search, far above the 40 tiles of any published setting
PAD_COLOUR = (123, 116, 103)  # 255 times the ImageNet mean, floored

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes the picture upright
_SIDEWAYS = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be, and whether its EXIF orientation counts."""

    max_pixels: int = MAX_PIXELS
    max_aspect_ratio: float = 200.0
    exif_orientation: bool = True
    max_data_url_length: int = 64 * 2**20  # characters, checked before base64 is decoded
    max_decode_s: float = 10.0  # from the first byte of the header to the last pixel

    def __post_init__(self) -> None:
        for field in ("max_pixels", "max_aspect_ratio", "max_data_url_length"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not self.max_decode_s > 0:
            raise ConfigError(f"max_decode_s must be above 0, got {self.max_decode_s}")


# Opening


def open_image(source: ImageSource, limits: ImageLimits | None = None, *, name: str = "image") -> Image.Image:
    """The decoded RGB picture, upright; it may be the caller's own object when that is RGB already.

    `source` is a path, the bytes of a file, a PIL image, a uint8 array (height, width[, 3 or 4]) or a base64 data URL.
    Raises `InvalidRequestError` with a fixed one-line text that starts with `name`.
    """
    limits = limits or ImageLimits()
    with _opened(source, limits, name) as picture:
        _upright_size(picture, limits, name)
        turn = _turn(picture, limits)
        if not isinstance(source, Image.Image):
            # Alpha is dropped anyway; Pillow would warn about it, or fail on a colour that is not in the palette.
            picture.info.pop("transparency", None)
        try:
            picture = _to_rgb(picture, name)
        except _TooSlowError:
            raise _too_slow(limits, name) from None
        if turn is not None:
            picture = picture.transpose(turn)
            picture.info.clear()  # the orientation tag would turn the picture once more if it were opened again
        return picture


def image_size(source: ImageSource, limits: ImageLimits | None = None, *, name: str = "image") -> Size:
    """(width, height) of what `open_image` gives, from the header alone, within the same limits."""
    limits = limits or ImageLimits()
    with _opened(source, limits, name) as picture:
        return _upright_size(picture, limits, name)


def check_size(width: int, height: int, limits: ImageLimits, name: str) -> None:
    """Raises `InvalidRequestError` where a size is empty or beyond the limits."""
    if min(width, height) < 1:
        raise InvalidRequestError(f"{name}: {width}x{height} has no pixels")
    if width * height > limits.max_pixels:
        raise InvalidRequestError(f"{name}: {width}x{height} exceeds the limit of {limits.max_pixels} pixels")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise InvalidRequestError(
            f"{name}: {width}x{height} exceeds the aspect ratio limit of {limits.max_aspect_ratio:g}"
        )


def local_file(source: str | os.PathLike[str], name: str) -> Path:
    """The path of a non-empty regular file; nothing that looks like a URL is followed."""
    try:
        text = os.fsdecode(source)
    except TypeError:
        raise InvalidRequestError(f"{name}: a path or bytes are expected, got {type(source).__name__}") from None
    shown = repr(text if len(text) <= 200 else text[:200] + "...")  # one line, whatever the name holds
    if isinstance(source, str) and re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
        raise InvalidRequestError(f"{name}: URLs are not fetched here, pass a path or the bytes instead of {shown}")
    try:
        status = Path(text).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidRequestError(f"{name}: no such file: {shown}") from None
    except (OSError, ValueError):  # a name too long, a folder closed to us, a NUL in the name
        raise InvalidRequestError(f"{name}: cannot read {shown}") from None
    if stat.S_ISDIR(status.st_mode):
        raise InvalidRequestError(f"{name}: {shown} is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequestError(f"{name}: {shown} is not a regular file")
    if status.st_size == 0:
        raise InvalidRequestError(f"{name}: {shown} is empty")
    return Path(text)


@contextmanager
def _opened(source: ImageSource, limits: ImageLimits, name: str) -> Iterator[Image.Image]:
    """The picture of a source with its header read and its pixels, where they lie in a file, not yet."""
    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, np.ndarray):
        yield _from_array(source, name)
    elif isinstance(source, bytes):
        with _parsed(io.BytesIO(source), limits, name) as picture:
            yield picture
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = data_url_bytes(source, limits.max_data_url_length, name)
        with _parsed(io.BytesIO(data), limits, name) as picture:
            yield picture
    elif isinstance(source, (str, os.PathLike)):
        path = local_file(source, name)
        try:
            file = path.open("rb")
        except OSError:
            raise InvalidRequestError(f"{name}: cannot read {str(path)!r}") from None
        with file, _parsed(file, limits, name) as picture:
            yield picture
    else:
        raise InvalidRequestError(
            f"{name}: a path, bytes, a PIL image, a uint8 array or a data URL is expected, got {type(source).__name__}"
        )


def _parsed(file: IO[bytes], limits: ImageLimits, name: str) -> Image.Image:
    """Pillow's lazy image of a file: format recognised by content, header read."""
    try:
        picture = Image.open(_Timed(file, limits.max_decode_s), formats=FORMATS)
    except _TooSlowError:
        raise _too_slow(limits, name) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = min(limits.max_pixels, MAX_PIXELS)
        raise InvalidRequestError(f"{name}: exceeds the limit of {most} pixels") from None
    except UnidentifiedImageError:
        raise InvalidRequestError(f"{name}: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image") from None
    except Exception:  # plugins meet bad bytes with errors of every kind
        raise InvalidRequestError(f"{name}: cannot decode") from None
    if picture.info.get("progressive"):
        # A scan of the whole picture may be 60 bytes long: the clock is looked at after a few of them.
        picture.decodermaxblock = 1024
    return picture


class _TooSlowError(Exception):
    """The time of an image is over."""


def _too_slow(limits: ImageLimits, name: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: cannot decode within {limits.max_decode_s:g} s")


class _Timed:
    """A file that nothing can be read from when its time is over: decoders in C cannot be stopped from outside."""

    def __init__(self, file: IO[bytes], seconds: float) -> None:
        self._file = file
        self._end = time.monotonic() + seconds

    def read(self, size: int = -1) -> bytes:
        if time.monotonic() > self._end:
            raise _TooSlowError
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def data_url_bytes(url: str, max_length: int, name: str) -> bytes:
    """What a base64 data URL of at most `max_length` characters holds, whatever type it names."""
    if len(url) > max_length:
        raise InvalidRequestError(f"{name}: data URL of {len(url)} characters exceeds the limit of {max_length}")
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequestError(f"{name}: a data URL must read data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError(f"{name}: data URL is not valid base64") from None


def _from_array(array: npt.NDArray[Any], name: str) -> Image.Image:
    """RGB or grey image of a uint8 array (height, width), (height, width, 3) or (height, width, 4: alpha dropped)."""
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InvalidRequestError(
            f"{name}: an array must be uint8 of shape (height, width[, 3 or 4]), got {array.dtype} {array.shape}"
        )
    if array.size == 0:
        raise InvalidRequestError(f"{name}: {array.shape[1]}x{array.shape[0]} has no pixels")
    return Image.fromarray(array[..., :3] if array.ndim == 3 else array)


def _turn(picture: Image.Image, limits: ImageLimits) -> Image.Transpose | None:
    """What makes the picture upright, from metadata that stands before the pixels."""
    if not limits.exif_orientation:
        return None
    try:
        # Not `picture.getexif()`: PNG's own decodes the pixels to look for a chunk behind them.
        return _TURNS.get(Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata turns nothing
        return None


def _upright_size(picture: Image.Image, limits: ImageLimits, name: str) -> Size:
    width, height = picture.size
    check_size(width, height, limits, name)
    return (height, width) if _turn(picture, limits) in _SIDEWAYS else (width, height)


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    try:
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except _TooSlowError:
        raise
    except Exception:
        raise InvalidRequestError(f"{name}: cannot decode") from None


# Planning, from sizes alone


def choose_grid(width: int, height: int, tile_size: int = 448, min_tiles: int = 1, max_tiles: int = 12) -> Grid:
    """(columns, rows) of the grid whose ratio is nearest to the image's, with at most `max_tiles` tiles.

    Among grids of equally near ratio a larger one replaces the choice if the image covers more than half of its area.
    """
    ratio = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _candidate_grids(min_tiles, max_tiles):
        difference = abs(ratio - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * tile_size**2 * columns * rows:
            best = (columns, rows)
    return best


def count_tiles(grid: Grid, use_thumbnail: bool = True) -> int:
    """Tiles of a grid with the thumbnail, which only an image of more than one tile has."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if use_thumbnail and tiles > 1 else tiles


def plan_tiles(
    size: Size, tile_size: int = 448, min_tiles: int = 1, max_tiles: int = 12, use_thumbnail: bool = True
) -> tuple[Grid, int]:
    """(grid, number of tiles with the thumbnail) that `tile_image` gives for an image of this size."""
    grid = choose_grid(*size, tile_size, min_tiles, max_tiles)
    return grid, count_tiles(grid, use_thumbnail)


def share_tiles(
    sizes: Sequence[Size],
    max_tiles: Sequence[int],
    total_max_tiles: int,
    tile_size: int = 448,
    min_tiles: int = 1,
    use_thumbnail: bool = True,
) -> list[int]:
    """`max_tiles` for each image such that all tiles, thumbnails included, are at most `total_max_tiles`.

    One cap for all images, the highest that fits, is laid over each image's own `max_tiles`: equal images get equal
    tiles, wherever they stand. `min_tiles` yields to an image's own lower `max_tiles`. Raises `InvalidRequestError`
    where even `min_tiles` an image is too many.
    """

    def capped(cap: int) -> list[int]:
        return [min(own, cap) for own in max_tiles]

    def total(cap: int) -> int:  # never falls as the cap rises: a raised cap only adds grids of more tiles
        plans = zip(sizes, capped(cap), strict=True)
        return sum(plan_tiles(size, tile_size, min(min_tiles, most), most, use_thumbnail)[1] for size, most in plans)

    caps = range(min_tiles, max(max_tiles, default=min_tiles) + 1)
    fitting = bisect_right(caps, total_max_tiles, key=total)
    if fitting == 0:
        raise InvalidRequestError(
            f"total_max_tiles={total_max_tiles} is too few for {len(sizes)} image(s), which need {total(min_tiles)}"
        )
    return capped(caps[fitting - 1])


@lru_cache(maxsize=64)
def _candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """All grids by increasing area, those of one area by ascending columns (where the reference leaves it open)."""
    if not 1 <= min_tiles <= max_tiles <= MAX_TILES:
        raise InvalidRequestError(
            f"1 <= min_tiles <= max_tiles <= {MAX_TILES} must hold, got min_tiles={min_tiles}, max_tiles={max_tiles}"
        )
    return tuple(
        (columns, area // columns)
        for area in range(min_tiles, max_tiles + 1)
        for columns in range(1, area + 1)
        if area % columns == 0
    )


# Tiling


def tile_image(
    image: Image.Image | npt.NDArray[Any],
    tile_size: int = 448,
    min_tiles: int = 1,
    max_tiles: int = 12,
    use_thumbnail: bool = True,
    *,
    num_threads: int = 1,
) -> npt.NDArray[np.uint8]:
    """uint8 (tiles, tile_size, tile_size, 3): row-major tiles of the resized image, the thumbnail last.

    Bit-equal to the reference's Pillow pipeline for every size and mode. A pure function: no limits, no EXIF.
    """
    picture = _picture(image)
    grid = choose_grid(*picture.size, tile_size, min_tiles, max_tiles)
    tiles = np.empty((count_tiles(grid, use_thumbnail), tile_size, tile_size, 3), np.uint8)
    grids = [grid] if len(tiles) == grid[0] * grid[1] else [grid, (1, 1)]
    _fill_tiles(tiles, picture, grids, num_threads)
    return tiles


def tile_static(
    image: Image.Image | npt.NDArray[Any], tile_size: int = 448, *, pad2square: bool = False, name: str = "image"
) -> npt.NDArray[np.uint8]:
    """uint8 (1, tile_size, tile_size, 3): the whole image as one tile (`dynamic_image_size=False`).

    With `pad2square` it is first centred on a square of its longer side, which may hold at most `MAX_PIXELS`.
    """
    picture = _picture(image)
    if pad2square:
        width, height = picture.size
        side = max(width, height)
        if side**2 > MAX_PIXELS:
            raise InvalidRequestError(f"{name}: padded to {side}x{side} exceeds the limit of {MAX_PIXELS} pixels")
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    tiles = np.empty((1, tile_size, tile_size, 3), np.uint8)
    _fill_tiles(tiles, picture, [(1, 1)])
    return tiles


def _picture(image: Image.Image | npt.NDArray[Any]) -> Image.Image:
    """RGB picture with at least one pixel."""
    if isinstance(image, np.ndarray):
        image = _from_array(image, "image")
    elif not isinstance(image, Image.Image):
        raise InvalidRequestError(f"image: a PIL image or a uint8 array is expected, got {type(image).__name__}")
    if min(image.size) < 1:
        raise InvalidRequestError(f"image: {image.width}x{image.height} has no pixels")
    return _to_rgb(image, "image")


def _fill_tiles(
    tiles: npt.NDArray[np.uint8], picture: Image.Image, grids: Sequence[Grid], num_threads: int = 1
) -> None:
    """Resize the whole picture into each of the grids, which stand one behind the other in `tiles`."""
    height_first = _pass_order()
    if height_first is None:
        _fill_with_pillow(tiles, picture, grids)
    else:
        _fill_with_extension(tiles, picture, grids, height_first, num_threads)


def _fill_with_pillow(tiles: npt.NDArray[np.uint8], picture: Image.Image, grids: Sequence[Grid]) -> None:
    size = tiles.shape[1]
    for columns, rows in grids:
        resized = picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
        canvas = np.asarray(resized).reshape(rows, size, columns, size, 3).swapaxes(1, 2)
        tiles[: rows * columns].reshape(rows, columns, size, size, 3)[:] = canvas  # into a view
        tiles = tiles[rows * columns :]


def _fill_with_extension(
    tiles: npt.NDArray[np.uint8],
    picture: Image.Image,
    grids: Sequence[Grid],
    height_first: "HeightFirst",
    num_threads: int = 1,
    isa: str = "",
) -> None:
    assert extension is not None
    size = tiles.shape[1]
    ordered = [(columns, rows, height_first(picture.size, (columns * size, rows * size))) for columns, rows in grids]
    extension.fill_tiles(tiles, ordered, *picture.size, _blocks(picture), threads=num_threads, isa=isa)


def _blocks(picture: Image.Image) -> Iterator[npt.NDArray[np.uint8] | tuple[object, object]]:
    """The pixels by blocks of rows that stay in a cache: an array of a whole photograph takes longer than its tiles."""
    rows = 16 * max(1, 2**18 // (16 * picture.width))
    for top in range(0, picture.height, rows):
        block = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        try:
            yield block.__arrow_c_array__()  # Pillow's own memory
        except (AttributeError, ValueError):  # before Pillow 11.3, or not in one piece
            yield np.asarray(block)


# Pillow resizes one side after the other and rounds to 8 bits in between, so its bytes depend on which side is first.
HeightFirst = Callable[[Size, Size], bool]
_PASS_ORDERS: tuple[HeightFirst, ...] = (
    lambda old, new: old[1] > new[1] and old[1] - new[1] > 2 * (old[0] - new[0]),  # Pillow 13
    lambda old, new: old[1] > new[1] and old[1] > 100 * old[0],  # Pillow 12.2
    lambda old, new: False,  # before
)
_PROBES = ((9, 40), (2, 250), (20, 24), (11, 16), (12, 16), (40, 9), (5, 7), (8, 8))  # sizes that tell them apart


@lru_cache(maxsize=1)
def _pass_order() -> HeightFirst | None:
    """When the Pillow that is installed resizes the height first; None where the extension has not its bytes."""
    if extension is None:
        return None
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)) for width, height in _PROBES]
    expected, found = (np.empty((len(pictures), 8, 8, 3), np.uint8) for _ in range(2))
    for picture, tile in zip(pictures, expected, strict=True):
        _fill_with_pillow(tile[None], picture, [(1, 1)])
    for order in _PASS_ORDERS:
        for picture, tile in zip(pictures, found, strict=True):
            _fill_with_extension(tile[None], picture, [(1, 1)], order)
        if np.array_equal(expected, found):
            return order
    return None
