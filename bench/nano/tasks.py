"""The tasks of the bundled model and the numbered pictures that pose them."""

import random
from collections.abc import Callable

from .objects import draw_object, draw_shapes
from .picture import Picture
from .receipts import draw_chart, draw_receipt, draw_sign, draw_table
from .vocabulary import Split

KINDS: dict[str, Callable[[random.Random, Split], Picture]] = {
    "receipt": draw_receipt,
    "sign": draw_sign,
    "table": draw_table,
    "chart": draw_chart,
    "object": draw_object,
    "shapes": draw_shapes,
}

# Task -> the kind of picture that poses it.
TASKS = {
    "receipt total": "receipt",
    "receipt price": "receipt",
    "receipt shop": "receipt",
    "sign word": "sign",
    "sign number": "sign",
    "table cell": "table",
    "bar value": "chart",
    "highest bar": "chart",
    "object colour": "object",
    "object shape": "object",
    "caption": "object",
    "shape count": "shapes",
    "count of a shape": "shapes",
    "colour of a shape": "shapes",
}


def draw_picture(kind: str, split: Split, number: int) -> Picture:
    """The picture of this kind with this number: always the same one, and another one in the other split."""
    # Seeding by text keeps the numbers of two splits apart.
    return KINDS[kind](random.Random(f"{split} {kind} {number}"), split)
