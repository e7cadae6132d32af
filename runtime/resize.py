"""One image as one input of a given size, the two ways of the reference.

`crop`: the shorter side becomes its size and the middle is cut out (the checkpoints' own image processor; zero-shot
classification, linear probes). Otherwise the image is stretched (retrieval, captions).
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import InvalidRequestError

ImageSize = int | tuple[int, int]  # pixels of the side of a square, or (height, width)


def read_image_size(image_size: ImageSize | None, default: int, patch_size: int) -> tuple[int, int]:
    """(height, width) of what was asked for, or of `default`. Both must be multiples of `patch_size`."""
    size = default if image_size is None else image_size
    sides = size if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides) or any(
        side % patch_size for side in sides
    ):
        raise InvalidRequestError(
            f"image_size={image_size!r}: must be a positive multiple of {patch_size}, or a pair (height, width) of them"
        )
    return sides[0], sides[1]


def fit_image(image: Image.Image, size: tuple[int, int], *, crop: bool) -> npt.NDArray[np.uint8]:
    """uint8 (height, width, 3) of an RGB picture, resized with Pillow's bicubic. size: (height, width)."""
    height, width = size
    if not crop:
        return np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    # Rounded down, as the reference rounds.
    if image.width * height <= image.height * width:
        scaled = (width, max(height, width * image.height // image.width))
    else:
        scaled = (max(width, height * image.width // image.height), height)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    resized = image.resize(scaled, Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + width, top + height)))
