"""Drawn pictures as the tiles the runtime would cut, with the labels of every visual token."""

import numpy as np
import numpy.typing as npt

from vitrail.bench.nano.canvas import TILE_CELLS
from vitrail.bench.nano.picture import LABELS, Picture
from vitrail.runtime.image import tile_image

TILE = 224


def cut_tiles(picture: Picture) -> npt.NDArray[np.uint8]:
    """(tiles, 224, 224, 3), the thumbnail last where there is more than one."""
    return tile_image(picture.pixels, tile_size=TILE, min_tiles=1, max_tiles=2, use_thumbnail=True)


def cut_labels(picture: Picture) -> npt.NDArray[np.int8]:
    """(tiles, 64, labels): what each visual token should know; a thumbnail's tokens know nothing."""
    labels = np.stack([picture.labels[name] for name in LABELS], axis=-1)
    labels = labels.reshape(-1, TILE_CELLS * TILE_CELLS, len(LABELS))
    if labels.shape[0] > 1:
        labels = np.concatenate((labels, np.zeros_like(labels[:1])))
    return labels
