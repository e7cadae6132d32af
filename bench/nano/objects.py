"""Coloured shapes: one to be named, several to be counted."""

import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .canvas import TILE_CELLS, Mask
from .picture import FIELDS, Picture, Question, Sheet
from .receipts import new_sheet
from .vocabulary import COLOURS, PAPERS, SHAPES, Split

SMOOTH = 4  # masks are drawn this much larger and averaged


@lru_cache(maxsize=2048)
def shape_mask(shape: str, size: int) -> Mask:
    """The coverage, 0 to 1, of a shape that fills a size x size square."""
    side = size * SMOOTH
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    if shape == "square":
        draw.rectangle((side * 0.06, side * 0.06, side * 0.94, side * 0.94), fill=255)
    elif shape == "triangle":
        draw.polygon([(side / 2, side * 0.04), (side * 0.98, side * 0.92), (side * 0.02, side * 0.92)], fill=255)
    elif shape == "star":
        points = []
        for corner in range(10):
            radius = side * (0.5 if corner % 2 == 0 else 0.21)
            angle = math.pi * (corner / 5 - 0.5)
            points.append((side / 2 + radius * math.cos(angle), side * 0.52 + radius * math.sin(angle)))
        draw.polygon(points, fill=255)
    elif shape == "cross":
        draw.rectangle((side * 0.36, side * 0.04, side * 0.64, side * 0.96), fill=255)
        draw.rectangle((side * 0.04, side * 0.36, side * 0.96, side * 0.64), fill=255)
    else:
        draw.ellipse((side * 0.02, side * 0.02, side * 0.98, side * 0.98), fill=255)
        if shape == "ring":
            draw.ellipse((side * 0.27, side * 0.27, side * 0.73, side * 0.73), fill=0)
    return np.asarray(image.reduce(SMOOTH), dtype=np.float32)[:, :, None] / np.float32(255)


def _place(sheet: Sheet, shape: str, colour: str, left: float, top: float, side: float) -> None:
    """Draws one shape, its corner and side in cells, and labels the cells it covers most of."""
    size = round(side * sheet.cell)
    sheet.shape(shape_mask(shape, size), left, top, COLOURS[colour])
    values = {
        "field": FIELDS.index("object"),
        "shape": 1 + SHAPES.index(shape),
        "colour": 1 + list(COLOURS).index(colour),
    }
    dx, dy = (s / sheet.cell for s in sheet.shift)
    for row in range(TILE_CELLS):
        for column in range(TILE_CELLS):
            across = min(column + 1, left + dx + side) - max(column, left + dx)
            down = min(row + 1, top + dy + side) - max(row, top + dy)
            if across > 0 and down > 0 and across * down >= 0.4:
                sheet.mark(row, column, **values)


def draw_object(rng: random.Random, split: Split, cell: int | None = None) -> Picture:
    """One shape of any size anywhere."""
    sheet = new_sheet(rng, TILE_CELLS, rng.choice(PAPERS), cell)
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    side = rng.uniform(1.6, 5.5)
    _place(sheet, shape, colour, rng.uniform(0.2, 7.8 - side), rng.uniform(0.2, 7.8 - side), side)
    sheet.labels["kin"][sheet.labels["shape"] > 0] = 1
    sheet.labels["count"][:] = 1
    questions = [
        Question("object colour", rng.choice(("What colour is the object?", "What colour is it?")), colour),
        Question("object shape", rng.choice(("What shape is the object?", "What shape is it?")), shape),
        Question("caption", rng.choice(("Describe the picture.", "What is in the picture?")), f"a {colour} {shape}"),
    ]
    return sheet.picture("object", questions)


def draw_shapes(rng: random.Random, split: Split, cell: int | None = None) -> Picture:
    """One to six shapes, each in its own square of 2 x 2 cells."""
    sheet = new_sheet(rng, TILE_CELLS, rng.choice(PAPERS), cell)
    count = rng.randint(1, 6)
    kinds = rng.sample(SHAPES, rng.randint(1, 4))
    shapes = [rng.choice(kinds) for _ in range(count)]
    colours = [rng.choice(list(COLOURS)) for _ in shapes]
    for slot, shape, colour in zip(rng.sample(range(16), count), shapes, colours, strict=True):
        side = rng.uniform(1.5, 1.8)
        free = 2 - side
        left, top = 2 * (slot % 4) + rng.uniform(0, free), 2 * (slot // 4) + rng.uniform(0, free)
        _place(sheet, shape, colour, left, top, side)
    for shape in set(shapes):
        sheet.labels["kin"][sheet.labels["shape"] == 1 + SHAPES.index(shape)] = shapes.count(shape)
    sheet.labels["count"][:] = count
    how_many = rng.choice(("How many shapes are there?", "How many shapes are in the picture?"))
    questions = [Question("shape count", how_many, str(count))]
    for shape in sorted(set(shapes)):
        plural = "crosses" if shape == "cross" else f"{shape}s"
        number = shapes.count(shape)
        questions.append(Question("count of a shape", f"How many {plural} are there?", str(number)))
        if number == 1:
            colour = colours[shapes.index(shape)]
            questions.append(Question("colour of a shape", f"What colour is the {shape}?", colour))
    return sheet.picture("shapes", questions)
