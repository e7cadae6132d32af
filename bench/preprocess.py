"""Preprocessing of a decoded image to uint8 tiles: vitrail against the official Pillow pipeline.

    python bench/preprocess.py [--threads N ...] [--repeats N] [--out DIR]

Both start from the same decoded Pillow image and end at the same uint8 array of tiles (which is checked); decoding is
left out. The official pipeline resizes, crops, adds the thumbnail and resizes every tile to its own size, on one
thread: Pillow has no other way. vitrail runs on as many threads as told.
"""

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from vitrail.bench.harness import compare, results_path, write_results
from vitrail.kernels.cpu_extension import extension, missing_because
from vitrail.runtime.image import choose_grid, tile_image

TILE_SIZE = 448
# Upright and lying, scaled up and down: from a small picture to a page at 300 dpi and a photograph.
SIZES = ((640, 480), (800, 1300), (1024, 768), (1920, 1080), (1080, 1920), (2480, 3508), (4000, 3000))


def official_tiles(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The tiles as the reference makes them, up to the conversion to floats."""
    columns, rows = choose_grid(*image.size, TILE_SIZE)
    resized = image.resize((columns * TILE_SIZE, rows * TILE_SIZE))
    tiles = []
    for index in range(columns * rows):
        left, top = index % columns * TILE_SIZE, index // columns * TILE_SIZE
        tiles.append(resized.crop((left, top, left + TILE_SIZE, top + TILE_SIZE)))
    if len(tiles) > 1:
        tiles.append(image.resize((TILE_SIZE, TILE_SIZE)))
    same = [tile.resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BICUBIC) for tile in tiles]
    return np.stack([np.asarray(tile) for tile in same])


def measure_size(width: int, height: int, threads: list[int], repeats: int) -> dict[str, Any]:
    """One row: medians and ratios of one image size."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    official = official_tiles(image)
    contenders: dict[str, Any] = {"pillow": lambda: official_tiles(image)}
    for count in threads:
        if not np.array_equal(tile_image(image, num_threads=count), official):
            raise SystemExit(f"{width}x{height}: the tiles are not the official pipeline's")
        contenders[f"vitrail_{count}"] = lambda count=count: tile_image(image, num_threads=count)
    timings = compare(contenders, repeats=repeats, device="cpu")
    row: dict[str, Any] = {"image": f"{width}x{height}", "tiles": len(official), **timings["pillow"].row("pillow")}
    for count in threads:
        timing = timings[f"vitrail_{count}"]
        name = f"vitrail_{count}_thread{'s' if count > 1 else ''}"
        row |= {**timing.row(name), f"{name}_times_as_fast": timings["pillow"].median / timing.median}
    return row


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    if extension is None:
        raise SystemExit(f"the C++ extension is missing, so there is nothing to compare: {missing_because}")
    rows = []
    for width, height in SIZES:
        row = measure_size(width, height, arguments.threads, arguments.repeats)
        rows.append(row)
        print(" ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    path = write_results(
        results_path("preprocess", arguments.out),
        rows,
        title=f"A decoded image to uint8 tiles of {TILE_SIZE} pixels, vitrail against the official Pillow pipeline",
        notes=f"Medians; equal bytes; Pillow {PIL.__version__}; {extension.instruction_sets()[-1]}.",
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
