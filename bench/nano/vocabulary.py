"""The closed lists that pictures and questions are made of, and the split that keeps some strings for measuring."""

import random
import zlib
from typing import Literal

from .canvas import Colour

Split = Literal["train", "held-out"]

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789$.-"
ITEMS = "TEA PIE HAM EGG JAM NUT FIG OIL RYE COD BUN CAN CUP PEN INK TOY HAT BAG SOY PEA YAM GUM ICE POT".split()
DAYS = {
    "MO": "monday", "TU": "tuesday", "WE": "wednesday", "TH": "thursday", "FR": "friday", "SA": "saturday",
    "SU": "sunday",
}  # fmt: skip
HEADINGS = "AM PM IN UP ON GO".split()
BARS = "ABCDEFGH"
FAREWELLS = "THANKS CHEERS ENJOY BYE".split()
SHAPES = "circle square triangle star cross ring".split()
COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 210), "yellow": (235, 190, 20),
    "purple": (140, 50, 170), "black": (25, 25, 25),
}  # fmt: skip
PAPERS: tuple[Colour, ...] = (
    (255, 255, 255), (250, 246, 235), (240, 244, 250), (236, 248, 238), (252, 240, 240), (245, 245, 245),
)  # fmt: skip
INKS: tuple[Colour, ...] = ((15, 15, 15), (20, 40, 110), (110, 20, 30), (15, 80, 40), (70, 40, 90))

_HELD_OUT_SHARE = 5  # one string in five is never trained on


def belongs(split: Split, text: str) -> bool:
    """Whether a string may appear in this split: each is in exactly one, by its checksum."""
    return (zlib.crc32(text.encode()) % _HELD_OUT_SHARE == 0) == (split == "held-out")


def draw_word(rng: random.Random, split: Split, shortest: int, longest: int) -> str:
    """A made-up word of the split: pronounceable half of the time, any letters otherwise."""
    while True:
        length = rng.randint(shortest, longest)
        if rng.random() < 0.5:
            first = rng.randrange(2)
            word = "".join(rng.choice("BCDFGHJKLMNPRSTVWXZ" if (i + first) % 2 else "AEIOUY") for i in range(length))
        else:
            word = "".join(rng.choices(CHARACTERS[:26], k=length))
        if belongs(split, word) and word not in FAREWELLS:
            return word


def draw_number(rng: random.Random, split: Split, longest: int) -> str:
    """A number of the split, of 2 to `longest` digits, without leading zeros."""
    while True:
        length = rng.randint(2, longest)
        number = str(rng.randint(10 ** (length - 1), 10**length - 1))
        if belongs(split, number):
            return number
